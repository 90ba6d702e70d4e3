"""The arm: a seven-joint manipulator with a Panda's kinematics, a parallel gripper, and geometry of primitives.

Frames, joint limits and the distance from flange to fingertip follow the Denavit-Hartenberg table, the joint limits and
the hand's drawing in Franka Robotics' public documentation (FCI, "Robot and interface specifications"). Masses are
rounded values that add up to a plausible 17 kg; shapes are capsules and boxes that only the fingers and the hand use to
collide. Gravity is compensated in the model, as the real controller does, so a joint target is reached without sag.
"""

from __future__ import annotations

import math

NUM_JOINTS = 7
JOINT_NAMES = tuple(f"joint{i}" for i in range(1, NUM_JOINTS + 1))
FINGER_NAMES = ("finger_left", "finger_right")

JOINT_LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # rad
JOINT_HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)  # rad
JOINT_SPEED = (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61)  # rad/s
FINGER_TRAVEL = 0.04  # m, of each finger: the gripper opens to twice that

# The fingertip 20 cm above the table at x = 46 cm, pointing down, jaws along y.
HOME = (0.0, -0.05996329, 0.0, -2.50938908, 0.0, 2.44942579, math.pi / 4)  # rad

# Stiffness and damping of the joint position servos: a step of a target is 85 to 100 % done after one control step
# (50 ms). Force limits are above a real Panda's so that a servo never saturates in free motion, where its step response
# would depend on the step's size.
_SERVO_KP = (4000, 4000, 4000, 4000, 1500, 1500, 1500)  # N m/rad
_SERVO_KV = (110, 130, 90, 90, 35, 35, 35)  # N m s/rad
_SERVO_FORCE = (300, 300, 300, 300, 100, 100, 100)  # N m
# Fingers that close in a fifth of a second on 8 N: harder ones press so deep into a light block, within the contacts'
# softness at this time step, that it is thrown out of the jaws.
_FINGER_KP, _FINGER_KV, _FINGER_FORCE = 1200, 25, 8  # N/m, N s/m, N

ARM_DEFAULTS = """
<default class="arm"><joint damping="1" armature="0.1"/></default>
<default class="shell"><geom contype="0" conaffinity="0" mass="0" rgba=".93 .93 .95 1"/></default>
<default class="joint_cap"><geom contype="0" conaffinity="0" mass="0" rgba=".30 .33 .38 1"/></default>
<default class="finger"><geom type="box" contype="2" conaffinity="1" mass="0" friction="1.5 .02 .001"
  rgba=".22 .24 .28 1"/></default>"""

_LINKS_OPEN = """
<body name="link0" childclass="arm">
 <geom class="joint_cap" type="cylinder" size=".085 .07" pos="0 0 .07"/>
 <body name="link1" pos="0 0 .333" gravcomp="1">
  <inertial pos="0 -.02 -.05" mass="3.5" diaginertia=".03 .03 .01"/>
  <joint name="joint1" axis="0 0 1" range="-2.8973 2.8973"/>
  <geom class="shell" type="capsule" fromto="0 0 -.2 0 0 -.03" size=".065"/>
  <body name="link2" quat="1 -1 0 0" gravcomp="1">
   <inertial pos="0 -.07 .03" mass="3.5" diaginertia=".03 .01 .03"/>
   <joint name="joint2" axis="0 0 1" range="-1.7628 1.7628"/>
   <geom class="joint_cap" type="cylinder" fromto="0 0 -.08 0 0 .08" size=".062"/>
   <geom class="shell" type="capsule" fromto="0 -.05 0 0 -.25 0" size=".058"/>
   <body name="link3" pos="0 -.316 0" quat="1 1 0 0" gravcomp="1">
    <inertial pos=".03 .03 -.05" mass="3" diaginertia=".02 .02 .01"/>
    <joint name="joint3" axis="0 0 1" range="-2.8973 2.8973"/>
    <body name="link4" pos=".0825 0 0" quat="1 1 0 0" gravcomp="1">
     <inertial pos="-.04 .04 .02" mass="3" diaginertia=".02 .01 .02"/>
     <joint name="joint4" axis="0 0 1" range="-3.0718 -.0698"/>
     <geom class="joint_cap" type="cylinder" fromto="0 0 -.075 0 0 .075" size=".06"/>
     <geom class="shell" type="capsule" fromto="-.0825 .08 0 -.0825 .33 0" size=".05"/>
     <body name="link5" pos="-.0825 .384 0" quat="1 -1 0 0" gravcomp="1">
      <inertial pos="0 .03 -.1" mass="2" diaginertia=".03 .03 .01"/>
      <joint name="joint5" axis="0 0 1" range="-2.8973 2.8973"/>
      <body name="link6" quat="1 1 0 0" gravcomp="1">
       <inertial pos=".05 0 0" mass="1.2" diaginertia=".005 .005 .005"/>
       <joint name="joint6" axis="0 0 1" range="-.0175 3.7525"/>
       <geom class="joint_cap" type="cylinder" fromto="0 0 -.06 0 0 .06" size=".05"/>
       <body name="link7" pos=".088 0 0" quat="1 1 0 0" gravcomp="1">
        <inertial pos="0 0 .06" mass=".6" diaginertia=".002 .002 .001"/>
        <joint name="joint7" axis="0 0 1" range="-2.8973 2.8973"/>
        <geom class="shell" type="capsule" fromto="0 0 -.01 0 0 .07" size=".042"/>
        <body name="hand" pos="0 0 .107" quat="0.9238795325 0 0 -0.3826834324" gravcomp="1">
         <inertial pos="0 0 .04" mass=".6" diaginertia=".002 .001 .002"/>
         <geom class="finger" name="hand" size=".024 .09 .025" pos="0 0 .025" rgba=".93 .93 .95 1"/>
         <site name="tip" pos="0 0 .1034" rgba="0 0 0 0" size=".001"/>
         <camera name="wrist" pos=".085 0 .005" xyaxes="0 1 0 .94 0 .34" fovy="78"/>"""

_FINGER = """
         <body name="{name}" pos="0 0 .0584" gravcomp="1">
          <inertial pos="0 0 .02" mass=".05" diaginertia="2e-5 2e-5 2e-5"/>
          <joint name="{name}" type="slide" axis="0 {sign} 0" range="0 .04" damping="30" armature=".02"/>
          <geom class="finger" name="{name}" size=".011 .007 .026" pos="0 {y} .025"/>
         </body>"""


def arm_bodies() -> str:
    """MJCF of the arm's bodies, for the inside of `<worldbody>`."""
    fingers = _FINGER.format(name=FINGER_NAMES[0], sign=1, y=0.007)
    fingers += _FINGER.format(name=FINGER_NAMES[1], sign=-1, y=-0.007)
    return _LINKS_OPEN + fingers + "</body>" * 9


def arm_actuators() -> str:
    """MJCF of the nine position servos, in the order of `JOINT_NAMES + FINGER_NAMES`."""
    rows = []
    for name, kp, kv, force in zip(JOINT_NAMES, _SERVO_KP, _SERVO_KV, _SERVO_FORCE, strict=True):
        rows.append(f'<position name="{name}" joint="{name}" kp="{kp}" kv="{kv}" forcerange="-{force} {force}"/>')
    rows += [
        f'<position name="{name}" joint="{name}" kp="{_FINGER_KP}" kv="{_FINGER_KV}" '
        f'forcerange="-{_FINGER_FORCE} {_FINGER_FORCE}"/>'
        for name in FINGER_NAMES
    ]
    return "".join(rows)
