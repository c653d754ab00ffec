"""Cuts the small WordNet that ships with the package out of WordNet 3.0, in WordNet's own file format.

    apt-get install wordnet-base
    python training/nltk/make_wordnet.py

It keeps the nouns that the SemCor corpus uses for visible things and its frequent adjectives (cntlist.rev), and every
word of common_words.txt, all with all their senses (so that sense numbers stay what they are), the hypernyms above
them and the antonyms beside them. Glosses, meronyms, derivations and verbs go. Synsets are addressed by their place in
the file, so every offset is numbered anew.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


PACKAGE_DATA = Path(__file__).parents[2] / "src" / "diffusers_iedit" / "pairs" / "nltk_data"

POINTERS = ("@", "@i", "~", "~i", "!", "&", "=", ";u", "-u")
"""Hypernyms and hyponyms, antonyms, similar adjectives, attributes, and usage ("ethnic slur")."""

# The format's fixed list of lexicographer files (lexnames(5WN)), which Debian leaves out and NLTK wants.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object "
    "noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape "
    "noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession "
    "verb.social verb.stative verb.weather adj.ppl"
).split()
VISIBLE = {f"{LEXNAMES.index(f'noun.{name}'):02}" for name in "animal artifact food object person plant".split()}
MIN_ADJECTIVE_COUNT = 5
PART_NUMBERS = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
FILES = {"n": "noun", "a": "adj"}

Key = tuple[str, int]  # part of speech ("n" or "a") and offset in the full database


@dataclass
class Synset:
    """One line of a data file."""

    lexname: str
    kind: str  # "n", "a" or "s", an adjective satellite
    lemmas: list[tuple[str, str]]  # name, with its case and syntactic marker, and lexical id
    pointers: list[tuple[str, Key, str]]  # symbol, target, "source word | target word" in hexadecimal


def word_of(name: str) -> str:
    """A lemma's name as the index spells it: lower case, without a marker such as "(p)"."""
    return name.partition("(")[0].lower()


def read_synsets(folder: Path) -> dict[Key, Synset]:
    """Every noun and adjective synset, in the order of the files."""
    synsets = {}
    for part, name in FILES.items():
        for line in (folder / f"data.{name}").read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields = iter(line.partition(" | ")[0].split())
            offset, lexname, kind = int(next(fields)), next(fields), next(fields)
            lemmas = [(next(fields), next(fields)) for _ in range(int(next(fields), 16))]
            pointers = []
            for _ in range(int(next(fields))):
                symbol, target, target_part, words = (next(fields) for _ in range(4))
                pointers.append((symbol, (target_part, int(target)), words))
            synsets[part, offset] = Synset(lexname, kind, lemmas, pointers)
    return synsets


def read_index(folder: Path) -> dict[tuple[str, str], list[Key]]:
    """(part of speech, word) -> its synsets, the most frequent sense first."""
    index = {}
    for part, name in FILES.items():
        for line in (folder / f"index.{name}").read_text("utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                index[part, fields[0]] = [(part, int(offset)) for offset in fields[-int(fields[2]) :]]
    return index


def choose(
    synsets: dict[Key, Synset], index: dict[tuple[str, str], list[Key]], words: set[tuple[str, str]]
) -> tuple[set[Key], set[tuple[str, str]]]:
    """The synsets to keep and the words that name them."""
    words, chosen = {word for word in words if word in index}, set()
    while True:
        waiting = [key for word in words for key in index[word] if key not in chosen]
        while waiting:
            key = waiting.pop()
            if key not in chosen:
                chosen.add(key)
                wanted = ("@", "@i") if key[0] == "n" else ("!", "&") if synsets[key].kind == "s" else ("!",)
                waiting += [to for symbol, to, _ in synsets[key].pointers if symbol in wanted and to[0] in FILES]
        # A synset that only lies on the way up needs one name, and that word in turn all its senses.
        nameless = [
            key for key in chosen if not any((key[0], word_of(name)) in words for name, _ in synsets[key].lemmas)
        ]
        if not nameless:
            return chosen, words
        words |= {(key[0], word_of(synsets[key].lemmas[0][0])) for key in nameless}


def write_database(
    folder: Path,
    licence: str,
    synsets: dict[Key, Synset],
    index: dict[tuple[str, str], list[Key]],
    chosen: set[Key],
    words: set[tuple[str, str]],
) -> None:
    """data.*, index.* and lexnames of the chosen part."""
    kept = {key: [(key[0], word_of(name)) in words for name, _ in synsets[key].lemmas] for key in chosen}

    def renumbered(key: Key, word_number: str) -> str | None:
        number = int(word_number, 16)
        if number == 0:
            return word_number
        return f"{sum(kept[key][:number]):02x}" if kept[key][number - 1] else None

    lines, offsets, symbols = defaultdict(list), {}, defaultdict(list)
    for key in sorted(chosen):
        synset = synsets[key]
        lemmas = [lemma for lemma, keep in zip(synset.lemmas, kept[key], strict=True) if keep]
        pointers = []
        for symbol, target, ends in synset.pointers:
            if symbol in POINTERS and target in chosen:
                ends = renumbered(key, ends[:2]), renumbered(target, ends[2:])
                if None not in ends:
                    pointers.append((symbol, target, "".join(ends)))
        symbols[key] = [symbol for symbol, _, _ in pointers]
        lines[key[0]].append((key, lemmas, pointers))
    # Two passes: an offset has eight digits whatever it is, so the lengths of the lines are known before the offsets.
    for passing in ("measure", "write"):
        for part, name in FILES.items():
            text = licence
            for key, lemmas, pointers in lines[part]:
                if passing == "measure":
                    offsets[key] = len(text.encode())
                fields = [f"{offsets[key]:08}", synsets[key].lexname, synsets[key].kind, f"{len(lemmas):02x}"]
                fields += [field for lemma in lemmas for field in lemma] + [f"{len(pointers):03}"]
                for symbol, target, ends in pointers:
                    fields += [symbol, f"{offsets.get(target, 0):08}", target[0], ends]
                text += " ".join(fields) + " |  \n"
            write(folder / f"data.{name}", text)
    for part, name in FILES.items():
        text = licence
        for word in sorted(word for word in words if word[0] == part):
            senses = index[word]
            used = sorted({symbol for key in senses for symbol in symbols[key]})
            fields = [word[1], part, str(len(senses)), str(len(used)), *used, str(len(senses)), "0"]
            text += " ".join(fields + [f"{offsets[key]:08}" for key in senses]) + "  \n"
        write(folder / f"index.{name}", text)
    for name in ("verb", "adv"):
        write(folder / f"data.{name}", licence)
        write(folder / f"index.{name}", licence)
        write(folder / f"{name}.exc", "")
    # NLTK opens it in order to map other versions' senses, which nothing here does.
    write(folder / "index.sense", "")
    lexnames = (f"{i:02}\t{name}\t{PART_NUMBERS[name.split('.')[0]]}\n" for i, name in enumerate(LEXNAMES))
    write(folder / "lexnames", "".join(lexnames))


def write(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, "utf-8", newline="\n")
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of the full database")
    parser.add_argument("--output_dir", type=Path, default=PACKAGE_DATA / "corpora" / "wordnet")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    synsets, index = read_synsets(args.wordnet), read_index(args.wordnet)
    counts = (args.wordnet / "cntlist.rev").read_text("utf-8").splitlines()
    words = set()
    for line in counts:
        word, _, sense = line.partition("%")
        kind, lexname = sense.split(":")[:2]
        if kind == "1" and lexname in VISIBLE:
            words.add(("n", word))
        elif kind in "35" and int(line.rpartition(" ")[2]) >= MIN_ADJECTIVE_COUNT:
            words.add(("a", word))
    for line in (PACKAGE_DATA / "common_words.txt").read_text("utf-8").splitlines():
        if not line.startswith(("#", "[")):
            for entry in line.split():
                word, _, sense = entry.partition("=")
                words |= {("n", word), ("a", word), ("n", sense.partition(".")[0])}
    chosen, words = choose(synsets, index, words)

    data_noun = (args.wordnet / "data.noun").read_text("utf-8").splitlines(keepends=True)
    licence = "".join(line for line in data_noun if line.startswith(" "))
    write_database(args.output_dir, licence, synsets, index, chosen, words)
    for name in FILES.values():
        pairs = (args.wordnet / f"{name}.exc").read_text("utf-8").splitlines(keepends=True)
        write(args.output_dir / f"{name}.exc", "".join(line for line in pairs if (name[0], line.split()[1]) in words))
    parts = {"1": "n", "3": "a", "5": "a"}
    kept = (line for line in counts if (parts.get(line.partition("%")[2][0]), line.partition("%")[0]) in words)
    write(args.output_dir / "cntlist.rev", "".join(f"{line}\n" for line in kept))
    write(args.output_dir / "LICENSE", "".join(f"{line[4:].rstrip()}\n" for line in licence.splitlines()))
    size = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(f"{len(chosen)} synsets, {len(words)} words, {size / 1e6:.2f} MB in {args.output_dir}")


if __name__ == "__main__":
    main()
