"""The ROS 2 side of vla-rl: only `policy_node` needs rclpy, only `launching` needs launch."""
