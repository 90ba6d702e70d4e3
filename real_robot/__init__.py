"""The hardware bridge: control loop, safety, drivers, the digital twin, ROS 2."""

if __name__ == "real_robot":
    raise ImportError("import vla_rl.real_robot, not real_robot")
