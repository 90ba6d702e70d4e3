"""What the launch files share: the lifecycle node with a parameter file, configured and activated as it comes up."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from pathlib import Path
from typing import Any


def parameter_file(name: str) -> str:
    """The installed `config/<name>.yaml`."""
    from ament_index_python.packages import get_package_share_directory

    return str(Path(get_package_share_directory("vla_rl_ros2")) / "config" / f"{name}.yaml")


def policy_launch(robot: str) -> Any:
    """Arguments: `params`, another parameter file; `policy_url`; `task`; `activate`, false to only configure."""
    import lifecycle_msgs.msg
    from launch import LaunchDescription  # pyright: ignore[reportAttributeAccessIssue]
    from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
    from launch.conditions import IfCondition
    from launch.events import matches_action
    from launch.substitutions import LaunchConfiguration
    from launch_ros.actions import LifecycleNode
    from launch_ros.event_handlers import OnStateTransition
    from launch_ros.events.lifecycle import ChangeState

    node = LifecycleNode(
        package="vla_rl_ros2",
        executable="policy_node",
        name="policy",
        namespace="",
        output="screen",
        parameters=[
            LaunchConfiguration("params"),
            {"policy.url": LaunchConfiguration("policy_url"), "task": LaunchConfiguration("task")},
        ],
        sigterm_timeout="5",  # the node sends the arm its stop first
    )

    def change(transition: int) -> Any:
        return EmitEvent(event=ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition))

    ready = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[change(lifecycle_msgs.msg.Transition.TRANSITION_ACTIVATE)],
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("params", default_value=parameter_file(robot)),
            DeclareLaunchArgument("policy_url", default_value="ws://127.0.0.1:8000"),
            DeclareLaunchArgument("task", default_value=""),
            DeclareLaunchArgument("activate", default_value="true"),
            node,
            RegisterEventHandler(ready, condition=IfCondition(LaunchConfiguration("activate"))),
            change(lifecycle_msgs.msg.Transition.TRANSITION_CONFIGURE),
        ]
    )


__all__ = ["parameter_file", "policy_launch"]
