"""The policy on the digital twin: ros2 launch vla_rl_ros2 twin.launch.py task:="..."."""

from vla_rl_ros2.launching import policy_launch


def generate_launch_description():  # noqa: ANN201  (launch's own type)
    return policy_launch("twin")
