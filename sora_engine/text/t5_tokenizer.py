"""T5's tokenizer, by the tokenizers library: from `tokenizer.json` or from a SentencePiece model.

transformers' `T5Tokenizer` is the same pipeline around the same library, and takes a second to
import; `tests/unit/test_tokenizers.py` holds the two together.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.text.sentencepiece import SentencePieceModel

CLASSES = ("T5Tokenizer", "T5TokenizerFast")
FILES = ("tokenizer.json", "spiece.model")
UNK_ID = 2
"""What T5's vocabularies have for an unknown piece, after padding and the end mark."""
_NAMED = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class T5Tokenizer:
    """Texts to ids."""

    def __init__(self, tokenizer: Any, *, eos_id: int, pad_id: int) -> None:
        """tokenizer: a `tokenizers.Tokenizer`, which adds nothing to a text."""
        self.tokenizer = tokenizer
        self.eos_id = eos_id
        self.pad_id = pad_id

    @classmethod
    def build(
        cls,
        pieces: Sequence[tuple[str, float]],
        charsmap: bytes | None,
        named: Mapping[str, str],
        added: Sequence[Any] = (),
    ) -> T5Tokenizer:
        """Of pieces with their log-probabilities, the compiled normaliser, the end mark, unknown
        and padding by the names of `tokenizer_config.json`, and `AddedToken`s in the order of
        their ids."""
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import Unigram
        from tokenizers.normalizers import Precompiled
        from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
        from tokenizers.pre_tokenizers import Sequence as InTurn

        words = Tokenizer(Unigram(list(pieces), unk_id=UNK_ID, byte_fallback=False))
        if charsmap is not None:
            words.normalizer = Precompiled(charsmap)
        words.pre_tokenizer = InTurn([WhitespaceSplit(), Metaspace(prepend_scheme="always")])
        tokens = {**_NAMED, **named}
        there = {token.content for token in added}
        words.add_tokens(list(added))
        words.add_special_tokens(
            [AddedToken(t, special=True) for t in tokens.values() if t not in there]
        )
        eos_id, pad_id = (words.token_to_id(tokens[key]) for key in ("eos_token", "pad_token"))
        assert eos_id is not None, "it was added"
        assert pad_id is not None, "it was added"
        return cls(words, eos_id=eos_id, pad_id=pad_id)

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def ids(self, text: str, most: int | None = None) -> list[int]:
        """Of a text, cut to `most` where it is longer; the end mark is the last and counts."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*(ids if most is None else ids[: most - 1]), self.eos_id]


def load_tokenizer(folder: Path) -> T5Tokenizer:
    """From the files of `folder`; no code of the folder's own runs.

    `tokenizer.json`, or `spiece.model` where that is all there is; `tokenizer_config.json` may be
    missing beside either. Raises CheckpointError.
    """
    path = folder / "tokenizer_config.json"
    present = [name for name in FILES if (folder / name).is_file()]
    # T5's hundred sentinels stand in no prompt, and a file that lacks them may fill the encoder.
    config = {"extra_ids": 0} if present and not path.exists() else read_json_object(path)
    if "auto_map" in config:
        raise CheckpointError("auto_map asks for code of the folder's own", path=path)
    name = config.get("tokenizer_class", CLASSES[0])
    if name not in CLASSES:
        raise CheckpointError(
            f"tokenizer_class is {name!r}; supported: {', '.join(CLASSES)}", path=path
        )
    if not present:
        raise CheckpointError(f"no {' and no '.join(FILES)}", path=folder)
    source = folder / present[0]
    if present[0] == "spiece.model":
        return tokenizer_of(SentencePieceModel.read(source), config, source)
    written = read_json_object(source)
    try:
        return _from_json(written, config)
    except Exception as error:  # the library raises what it likes for files that it cannot use
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"not a T5 tokenizer: {reason}", path=folder) from error


def tokenizer_of(model: SentencePieceModel, config: Mapping[str, Any], path: Path) -> T5Tokenizer:
    """Of a SentencePiece model. config: of `tokenizer_config.json`. path: for errors. Raises
    CheckpointError."""
    from tokenizers import AddedToken

    if model.unk_id != UNK_ID:
        raise CheckpointError(
            f"the unknown piece has the id {model.unk_id}; T5's has {UNK_ID}", path=path
        )
    extra = [f"<extra_id_{i}>" for i in reversed(range(int(config.get("extra_ids", 100))))]
    pieces = [*model.pieces, *((token, 0.0) for token in extra)]
    added = [AddedToken(token, special=True) for token in extra]
    return T5Tokenizer.build(pieces, model.charsmap, _named(config), added)


def _from_json(written: Mapping[str, Any], config: Mapping[str, Any]) -> T5Tokenizer:
    from tokenizers import AddedToken

    model = written["model"]
    if model.get("type", "Unigram") != "Unigram":
        raise ValueError(f"its model is {model['type']!r}, and T5's is 'Unigram'")
    entries = {int(token["id"]): token for token in written.get("added_tokens", ())}
    decoder = config.get("added_tokens_decoder", {})
    entries |= {int(number): token for number, token in decoder.items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = {
        token["content"]: AddedToken(
            token["content"], **{flag: bool(token[flag]) for flag in flags if flag in token}
        )
        for _, token in sorted(entries.items())
    }
    more = [_content(token) for key in _LISTS for token in config.get(key) or ()]
    if not any("<extra_id_" in token for token in more):
        more += [f"<extra_id_{i}>" for i in range(int(config.get("extra_ids", 100)))]
    named = _named(config)
    for token in (*named.values(), *more):
        added.setdefault(token, AddedToken(token, special=True))
    return T5Tokenizer.build(
        [(str(piece), float(score)) for piece, score in model["vocab"]],
        _charsmap(written.get("normalizer")),
        named,
        list(added.values()),
    )


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes | None:
    """The compiled normaliser of a `tokenizer.json`, by itself or first among others."""
    if normalizer is None:
        return None
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return None


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """End mark, unknown and padding, as far as a configuration names them."""
    return {key: _content(config[key]) for key in _NAMED if config.get(key) is not None}


def _content(token: Any) -> str:
    """A special token, which configurations write as a text or as an object around one."""
    return str(token["content"] if isinstance(token, Mapping) else token)
