"""Simulators in processes of their own, with a Python of their own, behind the one contract.

robosuite and LIBERO pin another MuJoCo and numpy than this project, and ManiSkill has one environment a process on a
CPU. `RemoteStepEnv` starts `num_workers` processes of `vla_rl/envs/hosts/serve.py` in the simulator's Python, shares
the environments out between them, and steps them side by side. Messages go over a socket pair, pictures through shared
memory.

A process that dies, or that does not answer in time, is started again. The episodes that ran in it are lost: the
outcome of the step says so (`StepOutcome.lost`), `ChunkedEnv` drops them, and whoever counts episodes counts them
apart. Nothing is repeated silently.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.core import ActionSpec, CameraSpec, EnvSpec, Observation
from vla_rl.envs.hosts.protocol import receive, send
from vla_rl.envs.vector import stream_seed
from vla_rl.protocols import StepOutcome

_HOSTS = Path(__file__).resolve().parent / "hosts"
_LOG_TAIL = 2000  # characters of a dead process's output that an error shows


class SimulatorError(RuntimeError):
    """The simulator itself raised an error, or does not start."""


@dataclass(frozen=True)
class HostConfig:
    """Which simulator to start, and how.

    `python`: the interpreter. `module`: the host module's file, a bare name is one of `vla_rl/envs/hosts`. `options`:
    JSON values for its `build`. `environment`: variables added to this process's. A process that does not answer within
    `timeout_s` seconds, also to a chunk of all its environments, counts as dead (`start_timeout_s` while it builds);
    after `max_restarts` deaths without a step in between it is given up.
    """

    python: Path | str
    module: Path | str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 300.0
    timeout_s: float = 120.0
    max_restarts: int = 3

    @property
    def module_path(self) -> Path:
        """The host module's file. Raises FileNotFoundError where it, or the interpreter, is not there."""
        path = Path(self.module)
        path = path if path.suffix == ".py" else _HOSTS / f"{self.module}_host.py"
        for needed in (path, Path(self.python)):
            if not needed.exists():
                raise FileNotFoundError(f"{needed} is not there")
        return path


class _Died(Exception):
    """The process is gone or silent."""


class _Worker:
    """One process and its environments."""

    def __init__(self, config: HostConfig, num_envs: int) -> None:
        self.config, self.num_envs = config, num_envs
        self.pictures: dict[str, np.ndarray] = {}
        self.spec = self._start()

    def _start(self) -> dict[str, Any]:
        module = self.config.module_path
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        with theirs:
            self.process = subprocess.Popen(
                [str(self.config.python), str(_HOSTS / "serve.py"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=environment | dict(self.config.environment),
                start_new_session=True,  # Ctrl-C is the parent's to handle: it closes the socket
            )
        self.channel = ours
        self.channel.settimeout(self.config.start_timeout_s)
        try:
            build = {"call": "build", "module": str(module), "options": dict(self.config.options)}
            spec = self.call(build | {"num_envs": self.num_envs})[0]["spec"]
            self._share(spec["cameras"])
        except _Died as error:
            self.stop()
            raise SimulatorError(f"{self.config.module} does not start: {error}") from None
        except BaseException:
            self.stop()
            raise
        self.channel.settimeout(self.config.timeout_s)
        return spec

    def _share(self, cameras: Mapping[str, Sequence[int]]) -> None:
        shapes = {camera: (self.num_envs, height, width, 3) for camera, (height, width) in cameras.items()}
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        if not total:
            return
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.NamedTemporaryFile(prefix="vla_rl_", dir=folder) as file:  # both have it mapped when it goes
            file.truncate(total)
            memory = np.memmap(file.name, np.uint8, "r+")
            self.call({"call": "attach", "path": file.name})
        offset = 0
        for camera, shape in shapes.items():
            size = int(np.prod(shape))
            self.pictures[camera] = memory[offset : offset + size].reshape(shape)
            offset += size

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        try:
            send(self.channel, message, arrays)
        except OSError:
            raise _Died(self.last_words()) from None

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            message, arrays = receive(self.channel)
        except TimeoutError:
            raise _Died(f"no answer within {self.channel.gettimeout()} s; {self.last_words()}") from None
        except OSError:
            raise _Died(self.last_words()) from None
        if "error" in message:
            error = SimulatorError(message["error"])
            if message["traceback"]:
                error.add_note(message["traceback"])
            raise error
        return message, arrays

    def call(
        self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        self.send(message, arrays)
        return self.receive()

    def last_words(self) -> str:
        """How the process ended and the end of what it printed."""
        try:
            code: int | None = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL))
        text = self._log.read().decode(errors="replace").strip()
        return f"its process {'still runs' if code is None else f'ended with {code}'}" + (f":\n{text}" if text else "")

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        """Close the socket, which ends the process; one that hangs is killed."""
        self.channel.close()
        try:
            self.process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class RemoteStepEnv:
    """A `StepEnv` whose environments live in other processes.

    Environment i lives in worker `i % num_workers`. `num_lost`: episodes lost to dead processes so far. State is saved
    as the seed and the actions of each running episode and restored by playing them again, which is exact for a
    simulator that is deterministic given its seed.

    Raises SimulatorError where the simulator raises or does not start, FileNotFoundError without its Python.
    """

    def __init__(self, config: HostConfig, num_envs: int, *, num_workers: int = 1, stream: Sequence[int] = ()) -> None:
        """`stream`: numbers that are mixed into every seed, so that splits do not share an episode; () keeps seeds."""
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}, expected at least 1")
        self.num_envs = num_envs
        self.num_lost = 0
        self._stream = tuple(stream)
        self._deaths = 0
        workers = min(num_workers, num_envs)
        self._workers: list[_Worker] = []
        try:
            for w in range(workers):
                self._workers.append(_Worker(config, len(range(w, num_envs, workers))))
        except BaseException:
            self.close()
            raise
        self.spec = env_spec(self._workers[0].spec)
        self._seeds = [0] * num_envs
        self._history: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        self._running = np.zeros(num_envs, dtype=bool)
        self._gone = np.zeros(num_envs, dtype=bool)  # died with its process since the last reset
        self._lost = np.zeros(num_envs, dtype=bool)  # and had not ended
        cameras = self.spec.cameras.items()
        self._seen = np.zeros(num_envs, dtype=int)  # what `_shown` has of the present state: nothing, state, pictures
        # reward and flags of the steps that were run ahead and not asked for yet
        self._ahead: list[deque[tuple[float, np.ndarray]]] = [deque() for _ in range(num_envs)]
        self._shown = Observation(
            {c: torch.zeros(num_envs, s.height, s.width, 3, dtype=torch.uint8) for c, s in cameras},
            torch.zeros(num_envs, self.spec.state_dim),
            ("",) * num_envs,
        )

    def reset(self, env_ids: Tensor, seeds: Tensor) -> None:
        ids = env_ids.tolist()
        for i, seed in zip(ids, seeds.tolist(), strict=True):
            self._seeds[i], self._history[i] = stream_seed(self._stream, seed), []
            self._running[i] = self._lost[i] = self._gone[i] = False
            self._ahead[i].clear()
        self._seen[ids] = 0
        self._reset(ids)

    def begin_chunk(self, actions: Tensor, num_steps: Tensor, images: bool) -> None:
        """See `RunsAhead`: one question to each process for all steps and what is seen after them, and none waits for
        the others."""
        self._run(actions, num_steps.numpy(), images)

    def step(self, actions: Tensor, active: Tensor) -> StepOutcome:
        waiting = active.numpy() & [not ahead for ahead in self._ahead]
        if waiting.any():
            self._run(actions[:, None], waiting.astype(np.int64))
        reward, flags = np.zeros(self.num_envs, np.float32), np.zeros((3, self.num_envs), bool)
        for i in np.flatnonzero(active.numpy() & ~self._lost).tolist():
            reward[i], flags[:, i] = self._ahead[i].popleft()
        self._running &= ~(flags[0] | flags[1])
        lost = torch.from_numpy(self._lost.copy()) & active
        return StepOutcome(torch.from_numpy(reward), *map(torch.from_numpy, flags), lost=lost)

    def observe(self, env_ids: Tensor, images: bool) -> Observation:
        """An episode whose process died shows what it showed last."""
        ids = [i for i in env_ids.tolist() if not self._gone[i] and self._seen[i] < 1 + images]
        for own, (message, arrays) in self._ask("observe", ids, extra={"images": images}):
            self._show(own, message["sentences"], arrays["state"], images)
        shown = self._shown.select(env_ids)  # indexing copies
        return shown if images else Observation({}, shown.state, shown.instruction)

    def render(self, env_ids: Tensor) -> Tensor:
        frames: dict[int, Tensor] = {}
        for own, (_, arrays) in self._ask("render", [i for i in env_ids.tolist() if not self._gone[i]]):
            frames |= dict(zip(own, torch.from_numpy(arrays["frames"]), strict=True))
        if not frames:
            raise SimulatorError("the simulator's process died while rendering; its episodes are lost")
        black = torch.zeros_like(next(iter(frames.values())))
        return torch.stack([frames.get(i, black) for i in env_ids.tolist()])

    def expert_actions(self, env_ids: Tensor) -> Tensor:
        """What the simulator's scripted expert does now, float32 [M, A]; raises SimulatorError where it has none."""
        actions = torch.zeros(self.num_envs, self.spec.action.dim)
        for own, (_, arrays) in self._ask("expert", [i for i in env_ids.tolist() if not self._gone[i]]):
            actions[own] = torch.from_numpy(arrays["actions"]).float()
        return actions[env_ids]

    def state_dict(self) -> dict[str, Any]:
        dim = self.spec.action.dim
        return {
            "seeds": list(self._seeds),
            "history": [torch.as_tensor(np.array(h, dtype=np.float64).reshape(len(h), dim)) for h in self._history],
            "running": torch.as_tensor(self._running.copy()),
            "lost": torch.as_tensor(self._lost.copy()),
            "num_lost": self.num_lost,
            "state": self._shown.state.clone(),
            "images": {c: x.clone() for c, x in self._shown.images.items()},
            "instruction": list(self._shown.instruction),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the running episodes again, those that have ended too: their last state can still be asked for."""
        self._seeds = list(state["seeds"])
        history = [list(h.numpy()) for h in state["history"]]
        self._lost[:] = self._gone[:] = False
        self._seen[:] = 0
        self._shown = Observation(
            {c: x.clone() for c, x in state["images"].items()}, state["state"].clone(), tuple(state["instruction"])
        )
        lost = state["lost"].numpy()
        alive = np.flatnonzero(~lost).tolist()
        self._history = [[] for _ in history]
        self._reset(alive)
        limits = np.where(lost, 0, [len(h) for h in history])
        actions = torch.zeros(self.num_envs, int(limits.max()), self.spec.action.dim)
        for i in np.flatnonzero(limits).tolist():
            actions[i, : limits[i]] = state["history"][i]
        self._run(actions, limits)
        for i in range(self.num_envs):
            self._ahead[i].clear()
        self._history = history
        self._running = state["running"].numpy().copy() & ~self._lost
        self._lost, self._gone = self._lost | lost, self._gone | lost
        self.num_lost = state["num_lost"]

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    # ------------------------------------------------------------------------------------------------------ processes
    def _reset(self, ids: list[int]) -> None:
        """A process may die of the very reset; the episode has not begun then, so it is begun again elsewhere."""
        waiting = ids
        while waiting:
            answered = self._ask("reset", waiting, lambda own: {"seeds": np.array([self._seeds[i] for i in own])})
            done = {i for own, _ in answered for i in own}
            waiting = [i for i in waiting if i not in done]
            self._lost[waiting] = self._gone[waiting] = False
        self._running[ids] = True

    def _run(self, actions: Tensor, num_steps: np.ndarray, images: bool | None = None) -> None:
        """Steps of all whose episode goes on, `num_steps` [N] of `actions` [N, K, A]; what came of them is kept, and
        what is seen then, with pictures or without. None: nothing is looked at."""
        clamped = self.spec.action.clamp(actions).double().numpy()
        ids = np.flatnonzero((num_steps > 0) & ~self._lost & ~self._gone).tolist()
        self._seen[ids] = 0
        chunks = self._ask(
            "run", ids, lambda own: {"actions": clamped[own], "num_steps": num_steps[own]}, {"images": images}
        )
        for own, (message, arrays) in chunks:
            self._deaths = 0
            if message["seen"]:
                w, n = own[0] % len(self._workers), len(self._workers)
                self._show([w + i * n for i in message["seen"]], message["sentences"], arrays["state"], bool(images))
            for i, done, reward, flags in zip(own, *(arrays[x] for x in ("num_steps", "reward", "flags")), strict=True):
                self._history[i] += list(clamped[i, :done])
                self._ahead[i].extend(zip(reward[:done].tolist(), flags[:done], strict=True))

    def _show(self, own: list[int], sentences: Sequence[str], state: np.ndarray, images: bool) -> None:
        """What environments `own`, all of one process, look like now; the pictures are in the memory shared with it."""
        self._shown.state[own] = torch.from_numpy(state)
        worker = self._workers[own[0] % len(self._workers)]
        local = [i // len(self._workers) for i in own]
        for camera, pictures in worker.pictures.items() if images else ():
            self._shown.images[camera][own] = torch.from_numpy(pictures[local])
        said = list(self._shown.instruction)
        for i, sentence in zip(own, sentences, strict=True):
            said[i] = sentence
        self._shown = Observation(self._shown.images, self._shown.state, tuple(said))
        self._seen[own] = 1 + images

    def _ask(
        self, call: str, ids: Sequence[int], arrays: Any = None, extra: Mapping[str, Any] | None = None
    ) -> list[tuple[list[int], tuple[dict[str, Any], dict[str, np.ndarray]]]]:
        """Ask all workers that have some of `ids` at once; answers come with the ids that they are about. A worker that
        dies is started again, its episodes are lost, and its answer is missing."""
        n = len(self._workers)
        shares = [(w, [i for i in ids if i % n == w]) for w in range(n)]
        asked, answers, error = [], [], None
        for w, own in shares:
            if own:
                message = {"call": call, "ids": [i // n for i in own], **(extra or {})}
                try:
                    self._workers[w].send(message, arrays(own) if arrays else None)
                    asked.append((w, own))
                except _Died as death:
                    self._bury(w, death)
        for w, own in asked:
            try:
                answers.append((own, self._workers[w].receive()))
            except _Died as death:
                self._bury(w, death)
            except SimulatorError as raised:  # the others' answers must be read, or the next call gets them
                error = raised
        if error is not None:
            raise error
        return answers

    def _bury(self, w: int, death: _Died) -> None:
        """Count what is lost with worker `w` and start it again."""
        worker = self._workers[w]
        self._deaths += 1
        if self._deaths > worker.config.max_restarts:
            raise SimulatorError(
                f"{self.spec.name}: the simulator's process died {self._deaths} times without a step in between; "
                f"the last time {death}"
            )
        own = np.arange(w, self.num_envs, len(self._workers))
        self._gone[own] = True
        own = own[self._running[own]]
        self.num_lost += len(own)
        self._lost[own] = True
        self._running[own] = False
        print(
            f"{self.spec.name}: a simulator process died, {len(own)} running episodes are lost ({death})",
            file=sys.stderr,
            flush=True,
        )
        worker.restart()


def env_spec(spec: Mapping[str, Any]) -> EnvSpec:
    """What a host module's `spec()` says."""
    return EnvSpec(
        name=spec["name"],
        cameras={name: CameraSpec(*size) for name, size in spec["cameras"].items()},
        state_names=tuple(spec["state_names"]),
        action=ActionSpec(tuple(spec["action_low"]), tuple(spec["action_high"]), tuple(spec["action_names"])),
        max_episode_steps=spec["max_episode_steps"],
        control_hz=float(spec["control_hz"]),
    )
