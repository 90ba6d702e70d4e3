"""The ament_python package; `colcon build` calls it."""

from glob import glob

from setuptools import setup

NAME = "vla_rl_ros2"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
        (f"share/{NAME}/config", sorted(glob("config/*.yaml"))),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="vla-rl",
    maintainer_email="vla-rl@users.noreply.github.com",
    description="A lifecycle node that runs a vision-language-action policy on an arm, behind a safety filter",
    license="Apache-2.0",
    entry_points={"console_scripts": ["policy_node = vla_rl_ros2.policy_node:main"]},
)
