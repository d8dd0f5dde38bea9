"""Tokenizers as people have them, against SentencePiece itself."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import transformers

from sora_engine.errors import CheckpointError
from sora_engine.text.sentencepiece import SentencePieceModel
from sora_engine.text.t5_tokenizer import load_tokenizer

spm = pytest.importorskip("sentencepiece")

LINES = [
    "a red circle moves right on a white background",
    "Ein grünes Dreieck wächst, größer als die Sonne!",
    "蓝色的星星在黑色的背景上移动",
    "２０ ｆｕｌｌ　ｗｉｄｔｈ letters, ligatures ﬁ ﬂ, and 3.14",
]
PROMPTS = [
    *LINES,
    "the quick brown fox jumps over the lazy dog",
    "tabs\tand  many   spaces",
    "emoji 🦊 and zero\u200bwidth",
    "",
    "é vs e\u0301",
    "UPPER lower MiXeD",
]
# What a text may have of the tokens that are no words.
MARKED = ["a </s> b", "<pad>red<unk>", "x<extra_id_0>y <extra_id_2>", " <extra_id_1> ", "</s>"]
CONFIG = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIG |= {"pad_token": "<pad>", "extra_ids": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with T5's own special pieces, and the normaliser that T5's have (nmt_nfkc)."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(LINES * 40), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copy(trained, tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", [CONFIG, None], ids=["with a configuration", "alone"])
def test_spiece_alone_gives_the_ids_of_sentencepiece(folder, config, monkeypatch):
    """In an installation without sentencepiece, which the engine does not ask for."""
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = spm.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == reference.get_piece_size()
    for prompt in PROMPTS:
        assert tokenizer.ids(prompt) == [*reference.encode(prompt), 1], prompt


def test_sentinels_come_after_the_pieces(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "extra_ids": 3}))
    tokenizer = load_tokenizer(folder)
    size = len(tokenizer)
    found = [tokenizer.ids(f"<extra_id_{i}>")[0] for i in range(3)]
    assert found == [size - 1, size - 2, size - 3]


def test_special_tokens_as_objects(folder):
    """As transformers 4 wrote them."""
    token = {"content": "<unk>", "lstrip": False, "single_word": False, "__type": "AddedToken"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "eos_token": token}))
    assert load_tokenizer(folder).eos_id == 2


@pytest.fixture(params=[0, 3, 100])
def saved(folder, tmp_path, request):
    """As transformers saves it, with so many sentinels: its tokenizer and the folder."""
    extra = request.param
    model = SentencePieceModel.read(folder / "spiece.model")
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra))]
    theirs = transformers.T5Tokenizer(
        vocab=[*model.pieces, *sentinels],
        _spm_precompiled_charsmap=model.charsmap,
        extra_ids=extra,
    )
    theirs.save_pretrained(tmp_path / "saved")
    return theirs, tmp_path / "saved"


def test_the_ids_are_those_of_transformers(saved):
    theirs, folder = saved
    whole = load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    alone = load_tokenizer(folder)
    assert len(alone) == len(whole) == len(theirs)
    assert whole.pad_id == theirs.pad_token_id
    for prompt in (*PROMPTS, *MARKED):
        want = theirs(prompt).input_ids
        assert whole.ids(prompt) == alone.ids(prompt) == want, prompt
        cut = theirs(prompt, truncation=True, max_length=5).input_ids
        assert whole.ids(prompt, 5) == cut, prompt


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_ids": 2},
        {"added_tokens_decoder": {"3": {"content": "red", "lstrip": True, "special": True}}},
        {"additional_special_tokens": ["white", "<extra_id_0>"], "extra_ids": 1},
    ],
)
def test_tokens_that_a_configuration_adds(folder, tmp_path, changes):
    model = SentencePieceModel.read(folder / "spiece.model")
    mine = transformers.T5Tokenizer(
        vocab=model.pieces, _spm_precompiled_charsmap=model.charsmap, extra_ids=0
    )
    mine.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/tokenizer_config.json").write_text(json.dumps({**CONFIG, **changes}))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path / "saved")
    ours = load_tokenizer(tmp_path / "saved")
    assert len(ours) == len(theirs)
    for prompt in (*PROMPTS, *MARKED):
        assert ours.ids(prompt) == theirs(prompt).input_ids, prompt


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a SentencePiece model: it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"\x80\x04\x95pickled", "a pickle"),
        (b"\xff" * 40, "not a SentencePiece model"),
        (b"\x0a\x05hello", "not a SentencePiece model"),
    ],
)
def test_other_files_are_named(folder, content, words):
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as told:
        load_tokenizer(folder)
    assert told.value.path == folder / "spiece.model"
    assert "\n" not in str(told.value)


def test_a_model_that_is_cut_off(folder):
    path = folder / "spiece.model"
    whole = path.read_bytes()
    for size in (1, 10, len(whole) // 2 + 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            load_tokenizer(folder)


def test_other_kinds_of_models_are_refused(folder):
    for name, options in (("bpe", {"model_type": "bpe"}), ("ids", {"unk_id": 0, "pad_id": 2})):
        settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 120}
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 40),
            model_prefix=str(folder / name),
            hard_vocab_limit=name == "bpe",
            minloglevel=2,
            **{**settings, **options},
        )
        shutil.copy(folder / f"{name}.model", folder / "spiece.model")
        with pytest.raises(CheckpointError, match=r"another kind than unigram|has the id 0"):
            load_tokenizer(folder)
