"""Prompts, states as integers, tokenizers, pictures and padding of the public VLAs, against tables made by hand."""

import copy
import io
import json

import numpy as np
import pytest
import torch

from vla_rl.core import Observation
from vla_rl.data.normalization import Normalizer
from vla_rl.policies.blocks.images import resize_with_padding, to_unit_range
from vla_rl.policies.blocks.tokenizer import Tokenizer, TokenizerConfig
from vla_rl.policies.blocks.vla_inputs import PromptConfig, VLAInputs, prompts, state_bins

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ prompts
def test_state_bins_are_those_of_numpy():
    state = torch.tensor([[-1.5, -1.0, -0.999, 0.0, 0.9999, 1.0, 7.0]])
    assert state_bins(state).tolist() == [[-1, 0, 0, 128, 255, 255, 255]]
    edges = torch.arange(-128, 129).float()[None] / 128.0  # every edge itself
    many = torch.cat([edges, torch.randn(64, 257, generator=torch.Generator().manual_seed(0))])
    expected = np.digitize(many.double().numpy(), np.linspace(-1, 1, 257)[:-1]) - 1
    assert state_bins(many).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PromptConfig(), "pick the  red block\n"),  # openpi cleans, and both dividers become a space
        (PromptConfig(clean=False), " pick_the\n red block \n"),  # LeRobot only adds the end
        (PromptConfig("state"), "Task: pick the  red block, State: 0 191;\nAction: "),
        (PromptConfig("state", state_width=4), "Task: pick the  red block, State: 0 191 128 128;\nAction: "),
        (PromptConfig("question"), "In: What action should the robot take to pick the  red block?\nOut:"),
    ],
)
def test_prompts(config, expected):
    assert prompts((" pick_the\n red block ",), torch.tensor([[-1.0, 0.499]]), config) == [expected]


def test_a_line_gets_one_end():
    assert prompts(("go\n", "go"), torch.zeros(2, 1), PromptConfig(clean=False)) == ["go\n", "go\n"]
    assert prompts(("Pick Up",), torch.zeros(1, 1), PromptConfig("question"))[0].endswith("take to pick up?\nOut:")


# --------------------------------------------------------------------------------------------------------- tokenizers
def sentencepiece_file():
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["pick up the red block", "push the green block", "open the drawer"] * 20),
        model_writer=file,
        vocab_size=300,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


def json_file():
    words = {"<pad>": 0, "<unk>": 1, "push": 2, "it": 3, "!": 4}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    content |= {"pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    return json.dumps(content | {"model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}).encode()


def test_bytes():
    tokens = Tokenizer(TokenizerConfig(max_tokens=6))(["ab", "é", ""], end=2)
    assert tokens.tolist() == [[1, 100, 101, 2, 0, 0], [1, 198, 172, 2, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert Tokenizer(TokenizerConfig()).num_ids == 259


def test_sentencepiece_lies_in_the_policy_as_bytes(tmp_path):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file())
    tokenizer = Tokenizer.from_folder(tmp_path, bos=2, max_tokens=24)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    expected = [2, *reference.encode("push the red block 12\n")]
    row = tokenizer(["push the red block 12\n"])[0].tolist()
    assert row == expected + [0] * (24 - len(expected))
    assert reference.decode(row[1 : len(expected)]) == "push the red block 12\n"
    assert tokenizer.num_ids == reference.vocab_size()
    again = Tokenizer(tokenizer.config)
    again.load_state_dict(tokenizer.state_dict())
    for one in (again, copy.deepcopy(tokenizer)):
        assert one(["push the red block 12\n"])[0].tolist() == row


def test_json_with_a_last_token(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(json_file())
    tokenizer = Tokenizer.from_folder(tmp_path, bos=-1, max_tokens=4)
    assert tokenizer(["push it", "push it !"], end=4).tolist() == [[2, 3, 4, 0], [2, 3, 4, 0]]
    assert tokenizer.num_ids == 5


def test_tokenizer_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="named tokenizer"):
        Tokenizer.from_folder(tmp_path, bos=2, max_tokens=4)
    with pytest.raises(ValueError, match="has 5 tokens, the policy takes 4"):
        Tokenizer(TokenizerConfig(max_tokens=4))(["abcd"])


# ----------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize(("padding", "rows"), [("center", [1, 2]), ("top_left", [2, 3]), ("stretch", [0, 1, 2, 3])])
def test_where_the_black_goes(padding, rows):
    wide = torch.full((1, 4, 8, 3), 200, dtype=torch.uint8)
    picture = resize_with_padding(wide, 4, padding)[0]
    expected = torch.zeros(3, 4, 4, dtype=torch.uint8)
    expected[:, rows] = 200
    assert torch.equal(picture, expected)


def test_resizing_is_bilinear_without_smoothing():
    row = torch.tensor([0, 10, 20, 30, 40, 50, 60, 100], dtype=torch.uint8)
    picture = resize_with_padding(row[None, None, :, None].expand(1, 8, 8, 3), 4, "center")
    assert picture[0, 0, 0].tolist() == [5, 25, 45, 80]  # midway between neighbours
    same = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    assert torch.equal(resize_with_padding(same, 4, "center"), same.permute(0, 3, 1, 2))
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# ----------------------------------------------------------------------------------------------------- all of it
def make(**changes):
    settings = {
        "cameras": ("a",),
        "image_size": 8,
        "padding": "center",
        "tokenizer": TokenizerConfig(max_tokens=60),
        "prompt": PromptConfig("state"),
        "state_dim": 2,
        "action_dim": 3,
        "chunk_dim": 5,
    }
    return VLAInputs(**(settings | changes))


def observation(state):
    images = {"a": torch.full((1, 8, 8, 3), 9, dtype=torch.uint8)}
    return Observation(images, state, ("go",))


def test_the_state_is_normalised_before_it_is_written():
    inputs = make()
    inputs.set_normalization(
        Normalizer("quantiles", torch.tensor([10.0, 0.0]), torch.tensor([20.0, 1.0])),
        Normalizer("quantiles", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 8.0])),
    )
    seen = inputs(observation(torch.tensor([[20.0, -1.0]])))
    assert seen.state.tolist() == [[0.5, -1.0]]
    written = bytes(t - 3 for t in seen.tokens[0].tolist() if t >= 3).decode()
    assert written == "Task: go, State: 192 0;\nAction: "
    assert seen.images["a"].shape == (1, 3, 8, 8)


def test_actions_are_padded_after_normalisation_and_come_back():
    inputs = make()
    inputs.set_normalization(
        Normalizer("identity", torch.zeros(2), torch.ones(2)),
        Normalizer("mean_std", torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 8.0])),
    )
    chunk = inputs.normalize_actions(torch.tensor([[[3.0, 2.0, -5.0]]]))
    assert chunk.tolist() == [[[1.0, 0.0, -1.0, 0.0, 0.0]]]  # zeros, not (0 - mean) / std
    assert inputs.unnormalize_actions(chunk + torch.tensor([0, 0, 0, 9.0, 9.0])).tolist() == [[[3.0, 2.0, -5.0]]]


def test_input_errors_say_what_to_do():
    with pytest.raises(ValueError, match="3 action dimensions, the model at most 2"):
        make(chunk_dim=2)
    with pytest.raises(
        ValueError, match=r"needs the cameras \['a', 'b'\], the observation has \['a'\]; render \['b'\]"
    ):
        make(cameras=("a", "b"))(observation(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"needs state \[N, 2\], got \(1, 4\)"):
        make()(observation(torch.zeros(1, 4)))
