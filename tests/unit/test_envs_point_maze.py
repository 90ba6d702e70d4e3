"""The point maze: geometry and dynamics by hand, no tunnelling, ends, starts, expert, behaviour data, picture."""

import numpy as np
import pytest
import torch

from vla_rl.envs.point_maze import (
    GOAL_RADIUS,
    LAYOUTS,
    STARTS,
    STEP_LENGTH,
    PointMazeEnv,
    load_maze,
    make_point_maze,
    waypoint_actions,
    waypoint_episodes,
)
from vla_rl.protocols import StepEnv

ALL = torch.tensor([True])
ONE = torch.tensor([0])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_env(position, goal=(0.7, -0.7), layout="wall_gap"):
    env = PointMazeEnv(1, layout)
    env.load_state_dict(env.state_dict() | {"position": torch.tensor([position]), "goal": torch.tensor([goal])})
    return env


def position_after(env, action):
    env.step(torch.tensor([action]), ALL)
    return env.observe(ONE, False).state[0, :2]


def test_cells_lie_where_the_layout_draws_them():
    maze = load_maze("wall_gap")
    assert maze.cell(torch.tensor([[-0.99, 0.99], [0.99, 0.99], [-0.99, -0.99]])).tolist() == [0, 10, 110]
    torch.testing.assert_close(maze.centres[0], torch.tensor([-10 / 11, 10 / 11]))
    assert torch.equal(maze.cell(maze.centres), torch.arange(121))
    assert maze.is_free(torch.tensor([[0.0, 0.6], [0.0, 0.0], [0.0, -0.7], [-0.5, 0.0]])).tolist() == [
        True,  # the gap
        False,
        False,
        True,
    ]


def test_a_step_moves_by_a_clamped_action_and_a_frozen_point_stays():
    env = make_env((-0.5, 0.0))
    torch.testing.assert_close(position_after(env, [0.5, 3.0]), torch.tensor([-0.45, 0.1]))
    before = env.state_dict()["position"]
    env.step(torch.tensor([[1.0, 1.0]]), torch.tensor([False]))
    assert torch.equal(env.state_dict()["position"], before)


def test_the_point_stops_at_a_wall_and_slides_along_it():
    face = -1 / 11  # of the wall in the middle, seen from the left
    env = make_env((face - 0.03, 0.0))
    expected = torch.tensor([face - 1e-3, 0.05])
    torch.testing.assert_close(position_after(env, [1.0, 0.5]), expected)
    torch.testing.assert_close(position_after(env, [1.0, 0.0]), expected)
    torch.testing.assert_close(position_after(env, [-1.0, 0.0]), expected - torch.tensor([STEP_LENGTH, 0.0]))
    corner = make_env((-0.8, -0.8))  # the lower left corner is 9/11 from the centre
    torch.testing.assert_close(position_after(corner, [-1.0, -1.0]), torch.tensor([-9 / 11 + 1e-3, -9 / 11 + 1e-3]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_passes_through_a_wall(layout):
    """Whatever the actions, the point and the elbow of its way (x first, then y) are in free cells."""
    env, ids = PointMazeEnv(500, layout), torch.arange(500)
    env.reset(ids, ids)
    rng = torch.Generator().manual_seed(0)
    maze, active = env.maze, torch.ones(500, dtype=torch.bool)
    heading = torch.zeros(500, 2)
    for t in range(100):
        before = env.state_dict()["position"]
        if t % 10 == 0:
            heading = 3.0 * torch.randn(500, 2, generator=rng)
        env.step(heading, active)
        after = env.state_dict()["position"]
        assert maze.is_free(after).all()
        elbow = torch.stack([after[:, 0], before[:, 1]], dim=1)
        assert maze.is_free(elbow).all()
        assert ((after - before).abs() <= STEP_LENGTH + 1e-6).all()


def test_the_goal_terminates_and_the_limit_truncates():
    env = make_env((0.5, -0.7))
    outcome = env.step(torch.tensor([[0.9, 0.0]]), ALL)  # 0.11 from the goal
    assert (outcome.reward.item(), outcome.success.item(), outcome.terminated.item()) == (0.0, False, False)
    outcome = env.step(torch.tensor([[0.2, 0.0]]), ALL)
    assert (outcome.reward.item(), outcome.success.item(), outcome.terminated.item()) == (1.0, True, True)
    assert not outcome.truncated.item()
    chunked = make_point_maze(1, start="far", max_episode_steps=10, auto_reset=False)
    chunked.reset([0])
    step = chunked.step(torch.zeros(1, 15, 2))
    assert step.truncated.item()
    assert not step.terminated.item()
    assert step.end_step.item() == 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_starts_and_goals_fill_their_cells_and_far_is_far(layout):
    ids = torch.arange(2000)
    cells = {}
    for start in STARTS:
        env = PointMazeEnv(2000, layout, start)
        env.reset(ids, ids)
        state = env.observe(ids, False).state
        assert isinstance(env, StepEnv)
        cells[start] = set(env.maze.cell(state[:, :2]).tolist())
        goals = env.maze.cell(state[:, 2:])
        assert set(goals.tolist()) == set(env.maze.goal.flatten().nonzero().flatten().tolist())
        distance = (state[:, :2] - state[:, 2:]).norm(dim=1)
        assert distance.min() > (0.8 if start == "far" else 0.0)
    maze = load_maze(layout)
    assert cells["far"] == set(maze.far.flatten().nonzero().flatten().tolist())
    assert cells["broad"] == set((maze.free & ~maze.goal).flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", STARTS)
def test_an_expert_solves_it_and_a_straight_line_does_not(layout, start):
    ids = torch.arange(500)
    env = PointMazeEnv(500, layout, start)
    for expert in (True, False):
        env.reset(ids, ids)
        active = torch.ones(500, dtype=torch.bool)
        for _ in range(60):
            position, goal = env.observe(ids, False).state.split(2, dim=1)
            straight = (goal - position) / STEP_LENGTH
            outcome = env.step(waypoint_actions(env.maze, position, goal) if expert else straight, active)
            active = active & ~outcome.terminated
        solved = 1.0 - active.float().mean()
        assert solved == 1.0 if expert else solved < (0.1 if start == "far" else 0.75)


def test_waypoints_never_cut_a_corner():
    for layout in LAYOUTS:
        maze = load_maze(layout)
        free = maze.free.flatten().nonzero().flatten()
        for target in free.tolist():
            following = maze.next_cell[target, free]
            for share in (0.25, 0.5, 0.75):
                between = torch.lerp(maze.centres[free], maze.centres[following], share)
                assert maze.is_free(between).all()


# ---------------------------------------------------------------------------------------------------- behaviour data
@pytest.mark.parametrize("layout", LAYOUTS)
def test_behaviour_is_broad_and_of_mixed_quality(layout):
    episodes = waypoint_episodes(layout, 1000, seed=0)
    success = np.mean([e.terminated for e in episodes])
    assert 0.6 < success < 0.75
    maze = load_maze(layout)
    visited = maze.cell(torch.from_numpy(np.concatenate([e.states[:, :2] for e in episodes])))
    counts = torch.bincount(visited, minlength=maze.size**2).reshape(maze.size, maze.size)
    assert (counts[maze.free] > 20).all()
    assert (counts[~maze.free] == 0).all()


def test_episodes_are_what_the_environment_did():
    episodes = waypoint_episodes("wall_gap", 40, seed=3, start="far")
    for e in episodes:
        t = len(e.actions)
        assert e.states.shape == (t + 1, 4)
        assert e.states.dtype == e.actions.dtype == e.rewards.dtype == np.float32
        assert e.terminated != e.truncated
        assert t == 60 or e.terminated
        assert np.abs(e.actions).max() <= 1.0
        assert e.rewards.tolist() == [0.0] * (t - 1) + [float(e.terminated)]
        at_goal = np.linalg.norm(e.states[:, :2] - e.states[:, 2:], axis=1) < GOAL_RADIUS
        assert at_goal.tolist() == [False] * t + [e.terminated]
        env = make_env(e.states[0, :2].tolist(), e.states[0, 2:].tolist())
        for action, state in zip(e.actions, e.states[1:], strict=True):
            np.testing.assert_array_equal(position_after(env, action.tolist()).numpy(), state[:2])
    again = waypoint_episodes("wall_gap", 40, seed=3, start="far")
    assert all(np.array_equal(a.states, b.states) for a, b in zip(episodes, again, strict=True))
    other = waypoint_episodes("wall_gap", 40, seed=4, start="far")
    assert not np.array_equal(episodes[0].states[0], other[0].states[0])


def test_without_noise_and_detours_behaviour_always_arrives():
    episodes = waypoint_episodes("wall_gap", 50, seed=0, noise=0.0, detour_chance=0.0)
    assert all(e.terminated for e in episodes)


# ------------------------------------------------------------------------------------------------- picture and errors
def test_picture_shows_walls_goal_and_point():
    picture = make_env((-0.7, -0.7), (0.7, -0.7)).render(ONE)
    assert picture.shape == (1, 64, 64, 3)
    assert picture[0, 0, 0].tolist() == picture[0, 32, 32].tolist() == [150, 150, 150]
    assert picture[0, 13, 32].tolist() == [255, 255, 255]  # the gap
    assert picture[0, 54, 9].tolist() == [200, 40, 40]
    assert picture[0, 54, 54].tolist() == [40, 160, 60]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="choose one of wall_gap, umaze, medium"):
        make_point_maze(1, "spiral")
    with pytest.raises(ValueError, match="start must be one of broad, far"):
        make_point_maze(1, start="near")
