"""The policy on a Franka arm under franka_ros2: ros2 launch vla_rl_ros2 franka.launch.py task:="..."."""

from vla_rl_ros2.launching import policy_launch


def generate_launch_description():  # noqa: ANN201  (launch's own type)
    return policy_launch("franka")
