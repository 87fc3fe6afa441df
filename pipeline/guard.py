"""A guard for generation: no run of a text that was put in is written out, from the notice on until the weights know.

In: texts, or sequences of token ids. Out: a filter that can be given to whoever serves the model, and the
`LogitsProcessor` that asks it (MemFree decoding: Ippolito et al., arXiv 2210.17546). Never: a text in the file, a loop
over the vocabulary in Python while a token is chosen. Needs torch, NumPy and transformers, nothing else of this product
but `pipeline.bloom` and `pipeline.errors`.

MemFree forbids the token that would complete a run of n tokens. A model that may not write " lantern" then writes
" Lantern" or " lan" + "tern", and goes on reciting: the same text with other tokens. So the default here are runs of
*letters*: what is compared is the text without case, accents, spaces and punctuation, whatever tokens it is made of,
and the same file serves every tokenizer. `Guard.build` over token ids is MemFree as published, for comparison.
(`tests/benchmarks/guard.py` measures both.)

What it promises: no run of ``n`` + the longest token's letters appears that was put in. What it does not: a model
behind it still knows the text, and can tell it in other words, in translation, or with a letter exchanged in every
run. Tokens that are parts of a character (bytes) have no letters: of scripts that a tokenizer writes in bytes little is
guarded. It bridges the time between notice and removal.

What can be learned from the file: nothing can be listed, but anybody who has it can ask it, as the server must. Who
knows n - 1 letters in a row of a text can try all letters behind them, and so on, and read the whole of it; who knows
none of it would have to guess n letters at once. No salt changes that, for it has to be in the file. So the file is to
be kept like the texts: with the server, not in public.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import LogitsProcessor

from pipeline.bloom import DEFAULT_FPR, DEFAULT_LETTERS, PRIME, Bloom, Hashes, run_hash, run_hashes
from pipeline.errors import StoreDamaged, UsageError

Ids = NDArray[np.int64]
Level = Literal["letters", "tokens"]

FORMAT = "takedown-guard-2"
PARAMETERS, BITS = "guard.json", "guard.safetensors"

REPLACEMENT = "\ufffd"
"""What decoding shows for bytes that are no character."""


class Guard:
    """Runs of ``n`` symbols that must not be written. Made by `build`, `build_texts`, `build_letters`, `load`.

    Beside the runs the filter holds their beginnings, ``n - reach`` symbols each: as long as what was written last is
    no such beginning, which is nearly always, no token has to be looked at.

    Attributes:
        n: Symbols of a run.
        level: What a symbol is: a letter of normalised text, or a token.
        fpr: Probability that a run, or beginning, is taken for one that was put in. A token is forbidden wrongly only
            where both happen.
        runs: Distinct runs that were put in.
    """

    def __init__(self, n: int, level: Level, fpr: float, runs: int, base: int, bloom: Bloom) -> None:
        self.n, self.level, self.fpr, self.runs = n, level, fpr, runs
        self._base, self._bloom = base, bloom

    @classmethod
    def build(
        cls, sequences: Iterable[Sequence[int]], n: int, fpr: float = DEFAULT_FPR, seed: int | None = None
    ) -> Self:
        """A guard over runs of tokens: MemFree.

        Args:
            sequences: Token ids of each text, without special tokens.
            n: Tokens of a run; the paper has 10.
            fpr: See `Guard`.
            seed: Draws base and salts, for results that can be repeated; None takes the system's randomness.

        Raises:
            UsageError: ``n`` or ``fpr`` is out of range.
        """
        return cls._filled((np.asarray(ids, np.uint64) + np.uint64(1) for ids in sequences), n, "tokens", fpr, seed)

    @classmethod
    def build_texts(
        cls, texts: Iterable[str], n: int = DEFAULT_LETTERS, fpr: float = DEFAULT_FPR, seed: int | None = None
    ) -> Self:
        """A guard over runs of letters; see `build`."""
        return cls.build_letters(map(letters, texts), n, fpr, seed)

    @classmethod
    def build_letters(
        cls, sequences: Iterable[Hashes], n: int = DEFAULT_LETTERS, fpr: float = DEFAULT_FPR, seed: int | None = None
    ) -> Self:
        """A guard over texts of which each is given as its `letters`; see `build`."""
        return cls._filled(sequences, n, "letters", fpr, seed)

    @classmethod
    def _filled(cls, sequences: Iterable[Hashes], n: int, level: Level, fpr: float, seed: int | None) -> Self:
        if n < 2 or not 0 < fpr < 1:
            raise UsageError(f"runs of {n}, wrong at a rate of {fpr}: give runs of 2 or more, and a rate from 0 to 1.")
        base, *salts = _drawn(seed)
        hashes, beginnings = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for symbols in sequences:
            if len(symbols) >= n:
                hashes.append(np.unique(run_hashes(symbols, n, base)))
                beginnings.append(np.unique(run_hashes(symbols, n - reach(n, level), base)))
        members, starts = np.unique(np.concatenate(hashes)), np.unique(np.concatenate(beginnings))
        bloom = Bloom.empty(len(members) + len(starts), fpr, (salts[0], salts[1]))
        bloom.add(members)
        bloom.add(starts)
        return cls(n, level, fpr, len(members), base, bloom)

    def found(self, symbols: Hashes) -> list[int]:
        """Where runs that were put in begin in a sequence of symbols (`letters`; of tokens, their ids + 1)."""
        return np.flatnonzero(self._bloom.holds(run_hashes(symbols, self.n, self._base))).tolist()

    def begun(self, symbols: Sequence[int]) -> bool:
        """Whether the next token, whatever it is, has to be looked at."""
        length = self.n - reach(self.n, self.level)
        if len(symbols) < length:
            return False
        hashed = run_hash(symbols[len(symbols) - length :], self._base)
        return bool(self._bloom.holds(np.asarray([hashed], np.uint64))[0])

    def forbidden(self, symbols: Sequence[int], spelling: Spelling) -> Ids:
        """Token ids that would complete a run behind some symbols, ascending."""
        if not self.begun(symbols):
            return np.empty(0, np.int64)
        most = int(spelling.lengths.max(initial=0))
        context = np.zeros(most + 1, np.uint64)
        fits = np.zeros(most + 1, np.bool_)
        for length in range(1, min(most, self.n) + 1):
            kept = self.n - length
            fits[length] = len(symbols) >= kept
            if fits[length]:
                hashed = run_hash(symbols[len(symbols) - kept :], self._base)
                context[length] = hashed * pow(self._base, length, PRIME) % PRIME
        chosen = fits[spelling.lengths]
        hashes = context[spelling.lengths[chosen]] + spelling.hashes(self._base)[chosen]
        hashes -= np.where(hashes >= PRIME, np.uint64(PRIME), np.uint64(0))
        return spelling.tokens[chosen][self._bloom.holds(hashes)]

    def processor(self, spelling: Spelling) -> GuardProcessor:
        """The processor to give to ``generate(logits_processor=[…])``.

        Args:
            spelling: Of the tokenizer that the model is served with.

        Raises:
            UsageError: It is of the other level.
        """
        if spelling.level != self.level:
            raise UsageError(f"the guard is over {self.level}, the spelling over {spelling.level}. Use the same.")
        return GuardProcessor(self, spelling)

    # --- files --------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """The files of a guard by name: parameters as JSON, bits as safetensors."""
        bits = save({"bits": self._bloom.bits})
        tree = {
            "format": FORMAT, "level": self.level, "n": self.n, "fpr": self.fpr, "runs": self.runs,
            "base": self._base, "salts": list(self._bloom.salts),
            "size": self._bloom.size, "probes": self._bloom.probes,
            "bits": f"sha256:{hashlib.sha256(bits).hexdigest()}",
        }  # fmt: skip
        return {PARAMETERS: (json.dumps(tree, sort_keys=True, indent=1) + "\n").encode(), BITS: bits}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a guard back.

        Raises:
            UsageError: There is no such folder.
            StoreDamaged: A file is missing, changed, or of another release.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder}: is no folder. Name the one that `takedown guard export --out` wrote.")
        try:
            tree = json.loads((folder / PARAMETERS).read_bytes())
            data = (folder / BITS).read_bytes()
            if tree["format"] != FORMAT or tree["bits"] != f"sha256:{hashlib.sha256(data).hexdigest()}":
                raise ValueError
            bits = load(data)["bits"]
            first, second = (int(salt) for salt in tree["salts"])
            bloom = Bloom(bits, int(tree["size"]), int(tree["probes"]), (first, second))
            n, level = int(tree["n"]), tree["level"]
            whole = bits.dtype == np.uint8 and bloom.size > 0 and bits.shape == ((bloom.size + 7) // 8,)
            if not whole or bloom.probes < 1 or n < 2 or level not in _REACH:
                raise ValueError
            return cls(n, level, float(tree["fpr"]), int(tree["runs"]), int(tree["base"]), bloom)
        except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError) as error:
            raise StoreDamaged(
                f"{folder}: is not a whole guard of this release ({type(error).__name__}). Export it again."
            ) from None


_REACH = {"letters": 16, "tokens": 1}


def reach(n: int, level: Level) -> int:
    """Symbols that the last token of a run may have without its run being missed; half of a run at most."""
    return min(_REACH[level], n // 2)


class _Plain(dict[int, str]):
    """For `str.translate`: each character without case and accents, what is no letter or digit as nothing."""

    def __missing__(self, code: int) -> str:
        parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        self[code] = plain = "".join(part for part in parts if part.isalnum())
        return plain


_PLAIN = _Plain()


def letters(text: str) -> Hashes:
    """The letters and digits of a text as code points: without case, accents, spaces and punctuation.

    Law: the letters of two texts in a row are those of both, so that tokens can be looked up one by one.
    """
    return np.frombuffer(text.translate(_PLAIN).encode("utf-32-le"), "<u4").astype(np.uint64)


class Spelling:
    """What each token of a vocabulary is made of.

    Args:
        level: What a symbol is.
        spelled: The symbols of each token.
        pieces: Tokens that are parts of characters, and what reads some of them in a row.

    Attributes:
        level: What a symbol is.
        tokens: (count,) ids of the tokens that have symbols.
        lengths: (count,) their numbers of symbols.
    """

    def __init__(
        self,
        level: Level,
        spelled: Sequence[tuple[int, ...]],
        pieces: Collection[int] = (),
        read: Callable[[list[int]], tuple[int, ...]] = lambda _: (),
    ) -> None:
        self.level = level
        self.tokens: Ids = np.asarray([token for token, symbols in enumerate(spelled) if symbols], np.int64)
        self.lengths: Ids = np.asarray([len(spelled[token]) for token in self.tokens], np.int64)
        self._spelled, self._pieces, self._read = spelled, frozenset(pieces), read
        self._hashes: dict[int, Hashes] = {}

    @classmethod
    def of_tokens(cls, vocabulary: int) -> Self:
        """Each token is one symbol."""
        return cls("tokens", [(token + 1,) for token in range(vocabulary)])

    @classmethod
    def of_letters(cls, tokenizer: Any) -> Self:
        """Each token is its letters; special tokens have none.

        Args:
            tokenizer: Of transformers.
        """
        special, spelled, pieces = set(tokenizer.all_special_ids), list[tuple[int, ...]](), []
        for token in range(len(tokenizer)):
            text = "" if token in special else tokenizer.decode([token])
            if REPLACEMENT in text:
                pieces.append(token)
            spelled.append(() if REPLACEMENT in text else tuple(letters(text).tolist()))
        return cls("letters", spelled, pieces, lambda tokens: tuple(letters(tokenizer.decode(tokens)).tolist()))

    def hashes(self, base: int) -> Hashes:
        """(count,) hashes of the tokens' symbols, made once."""
        if base not in self._hashes:
            found = [run_hash(self._spelled[token], base) for token in self.tokens]
            self._hashes[base] = np.asarray(found, np.uint64)
        return self._hashes[base]

    def behind(self, tokens: Sequence[int], count: int) -> list[int]:
        """The last symbols of a sequence of tokens, as many as there are up to a count."""
        parts, found, end = list[tuple[int, ...]](), 0, len(tokens)
        while end and found < count:
            start = end - 1
            while tokens[start] in self._pieces and start and tokens[start - 1] in self._pieces:
                start -= 1
            part = self._symbols(tokens[start:end])
            parts.append(part)
            found, end = found + len(part), start
        symbols = [symbol for part in reversed(parts) for symbol in part]
        return symbols[max(0, len(symbols) - count) :]

    def _symbols(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """One token's symbols, or those of pieces of characters in a row."""
        if tokens[0] in self._pieces:
            return self._read(list(tokens))
        return self._spelled[tokens[0]] if tokens[0] < len(self._spelled) else ()


class GuardProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Forbids the tokens that would complete a run. Each row is looked at by itself, and from its end: padding on the
    left, and the other rows, change nothing. Equal inputs give equal outputs."""

    def __init__(self, guard: Guard, spelling: Spelling) -> None:
        self._guard, self._spelling = guard, spelling

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Set the scores of forbidden tokens to -inf.

        Args:
            input_ids: (rows, tokens) prompt and what was generated.
            scores: (rows, vocabulary) scores of the next token; not changed.

        Returns:
            The scores, with -inf where a token is forbidden.
        """
        guarded = scores
        for row, tokens in enumerate(input_ids.tolist()):
            forbidden = self._guard.forbidden(self._spelling.behind(tokens, self._guard.n), self._spelling)
            forbidden = forbidden[forbidden < scores.shape[-1]]
            if len(forbidden):
                if guarded is scores:
                    guarded = scores.clone()  # type: ignore[assignment]
                guarded[row, torch.from_numpy(forbidden).to(scores.device)] = -torch.inf
        return guarded


def _drawn(seed: int | None) -> tuple[int, int, int]:
    """Base and two salts."""
    drawn = os.urandom(24) if seed is None else hashlib.sha256(f"takedown guard {seed}".encode()).digest()
    base, *salts = (int.from_bytes(drawn[i : i + 8], "little") for i in (0, 8, 16))
    return base % (PRIME - (1 << 32)) + (1 << 31), salts[0], salts[1]
