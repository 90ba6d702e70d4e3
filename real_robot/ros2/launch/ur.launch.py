"""The policy on a Universal Robots arm under ur_robot_driver: ros2 launch vla_rl_ros2 ur.launch.py task:="..."."""

from vla_rl_ros2.launching import policy_launch


def generate_launch_description():  # noqa: ANN201  (launch's own type)
    return policy_launch("ur")
