"""Runs in franky's own environment: `FrankyArm` against franky-sim. The last line printed is the result.

The driver needs numpy alone, so the checkout's folders are laid out as packages here without installing torch.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path


def lay_out(root: Path) -> None:
    for name, folder in {"vla_rl": "vla_rl", "vla_rl.real_robot": "real_robot", "vla_rl.real_robot.drivers": "real_robot/drivers"}.items():  # fmt: skip # noqa: E501
        package = types.ModuleType(name)
        package.__path__ = [str(root / folder)]
        sys.modules[name] = package


def main() -> None:
    lay_out(Path(sys.argv[1]))
    import numpy as np
    from franky_sim import SimulationServer  # pyright: ignore[reportMissingImports]
    from franky_sim.mujoco_simulator import MujocoSimulator  # pyright: ignore[reportMissingImports]

    from vla_rl.real_robot.drivers.franky import FrankyArm, FrankyConfig
    from vla_rl.real_robot.interfaces import Arm, ArmSpec, Command

    one = np.ones(7)
    spec = ArmSpec("fr3", tuple(f"fr3_joint{i}" for i in range(1, 8)), -2.5 * one, 3.7 * one, 2 * one, 10 * one, 5000 * one, (0.0, 0.08), 15.0, 0 * one)  # fmt: skip # noqa: E501
    with MujocoSimulator() as simulator:
        robot = simulator.add_robot()
        with SimulationServer(simulator) as server:
            server.run_async()
            arm = FrankyArm(FrankyConfig(robot.hostname, relative_dynamics=0.2, realtime=False), spec)
            assert isinstance(arm, Arm)
            arm.connect()

            def clock() -> float:
                """The robot's own time: a busy machine simulates slower than real time."""
                return arm._robot.state.time.to_sec()

            start = arm.read().position
            faults, velocities, reads, count = set(), [], [], 45
            for k in range(count):  # 3 s of new targets at 15 Hz
                target = start + 0.2 * np.sin(np.pi / 2 * (k + 1) / count)
                applied = arm.send(Command(target, 0.02, k))
                assert np.array_equal(applied.position, target)
                time.sleep(1 / 15)
                begin = time.perf_counter()
                state = arm.read()
                reads.append(1e3 * (time.perf_counter() - begin))
                faults.add(state.fault)
                velocities.append(float(np.abs(state.velocity).max()))
            end = clock() + 3.0
            while clock() < end:
                time.sleep(0.05)
            state = arm.read()
            result = {
                "retargets": count,
                "reached": float(np.abs(state.position - target).max()),
                "largest_velocity": max(velocities),
                "read_ms": float(np.median(reads)),
                "fault_while_moving": "".join(sorted(faults)),
                "gripper": state.gripper,
            }
            arm.send(Command(start, 0.02, count))
            time.sleep(0.5)
            arm.stop("test")
            begin = clock()
            arm.stop("test")  # a second one changes nothing
            # The simulator's wrist chatters at rest, so standing is told by positions, over 20 ms of the robot's time.
            before = arm.read().position
            while clock() - begin < 5:
                mark = clock()
                while clock() - mark < 0.02:
                    time.sleep(0.005)
                now = arm.read().position
                if np.abs(now - before).max() < 5e-4:
                    break
                before = now
            result["stood_after_stop_s"] = clock() - begin
            stood = arm.read().position
            time.sleep(0.5)
            result["moved_after_stop"] = float(np.abs(arm.read().position - stood).max())
            arm.send(Command(start, 0.02, count + 1))  # a stop is no latch of the driver's
            arm.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
