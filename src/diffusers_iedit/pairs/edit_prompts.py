"""Edit prompts: a caption with one noun or adjective changed to another of its kind in NLTK's WordNet (Sec. 3.1)."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import random
import re
import shutil
import tempfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock

import nltk.data
from nltk.corpus import wordnet
from nltk.corpus.reader.wordnet import Synset
from nltk.tag import PerceptronTagger

from .options import EditOptions


logger = logging.getLogger(__name__)

_SHIPPED_DATA = Path(__file__).parent / "nltk_data"
_WORDNET_FILES = ("data.noun", "data.adj", "index.noun", "index.adj", "noun.exc", "adj.exc", "cntlist.rev")

# WordNet's readers move the positions of open files, so one caption is edited at a time in a process.
_LOCK = Lock()

# What a camera sees, by WordNet's lexicographer files. Places, bodies, groups and substances do not swap well.
_THINGS = frozenset({"animal", "artifact", "food", "object", "person", "plant"})
# What an adjective may be changed of: "blue water" -> "green water" is an edit, "water" -> "oil" is none.
_DESCRIBED = _THINGS | {"substance"}

# Too vague to be found in a picture, or about the picture itself.
_VAGUE = frozenset(
    "animal area arrangement art artwork background bottom bunch center close-up close_up closeup collage "
    "collection color colour corner couple cover creature design display drawing earth edge end floor food "
    "foreground front fruit furniture grass ground group half head illustration image interior item land line logo "
    "lot middle moon number object opening outside pair part pattern people person photo photograph picture piece "
    "plant point portrait poster print product rear rendering room row scene screen screenshot section set shot "
    "side sign silhouette sketch sky snapshot space stack star structure stuff style sun surface thing top tour "
    "track unit vector vegetable vehicle version video view wallpaper water way world".split()
)

# Nothing under these is changed or chosen: who people are, weapons, intimate things. Words that WordNet marks as
# slurs, vulgar or disparaging never are either.
_BLOCKED_KINDS = frozenset(
    "body_part.n.01 coffin.n.01 contraceptive.n.01 dead_person.n.01 drug.n.01 excrement.n.01 gallows.n.01 "
    "gravestone.n.01 inhabitant.n.01 instrument_of_torture.n.01 person_of_color.n.01 religious_person.n.01 "
    "sick_person.n.01 slave.n.01 toiletry.n.01 undergarment.n.01 weapon.n.01 weaponry.n.01 white.n.01".split()
)
_BLOCKED_USES = frozenset("ethnic_slur.n.01 disparagement.n.01 obscenity.n.02 vulgarism.n.01".split())
# A caption with one of these is left out: no edit of it belongs in a training set.
_UNSAFE = frozenset(
    "bikini blood bloody corpse dead erotic explicit genitals lingerie naked nipple nipples nsfw nude nudity penis "
    "porn pornographic sex sexual sexy topless vagina".split()
)
_BLOCKED_WORDS = frozenset("fag faggot gook kike mammy nigger paddy retard savage spic squaw tranny whore".split())

_CHILDREN = frozenset("baby boy child girl infant kid schoolboy schoolgirl teenager toddler".split())
_GENDERED = frozenset("he her hers herself him himself his she".split())
_NUMBERS = frozenset("two three four five six seven eight nine ten several many few some various both these".split())
_COLLECTIONS = frozenset("bunch bunches couple flock group groups herd line lot lots pack pile row stack".split())
# Adjectives that a compound may begin with and still be changed: WordNet lists "old man" and "little girl".
_FREE_ADJECTIVES = frozenset("big large little new old small young".split())

# Nouns that say what a thing is made of: what replaces the thing can be made of it too.
_MATERIALS = frozenset(
    "brick cartoon ceramic concrete cotton glass gold leather lego marble metal paper plastic plush silver steel "
    "stone straw toy wood wool".split()
)

_IRREGULAR_PLURALS = {
    "aircraft": "aircraft", "bison": "bison", "cactus": "cacti", "calf": "calves", "child": "children",
    "deer": "deer", "fish": "fish", "foot": "feet", "goldfish": "goldfish", "goose": "geese", "half": "halves",
    "hero": "heroes", "human": "humans", "knife": "knives", "leaf": "leaves", "life": "lives", "loaf": "loaves",
    "louse": "lice", "man": "men", "moose": "moose", "mouse": "mice", "ox": "oxen", "person": "people",
    "potato": "potatoes", "salmon": "salmon", "scarf": "scarves", "sheep": "sheep", "shelf": "shelves",
    "shrimp": "shrimp", "thief": "thieves", "tomato": "tomatoes", "tooth": "teeth", "trout": "trout",
    "volcano": "volcanoes", "wife": "wives", "wolf": "wolves", "woman": "women",
}  # fmt: skip
_SINGULARS = {plural: singular for singular, plural in _IRREGULAR_PLURALS.items()}
_VOWEL_SOUND = re.compile(
    r"(?!eu|one\b|once|uni(?!n|m)|us[aeiu]|ut[ei]|ukulele|ufo\b)[aeiou]|hour|honest|honou?r|heir"
)


@dataclass(frozen=True)
class Edit:
    """A changed caption and the words that name the change in both images (y_1^diff and y_2^diff of Sec. 3.4)."""

    prompt: str
    source_term: str
    target_term: str


@dataclass(frozen=True)
class _CommonWords:
    """common_words.txt: nouns by number with their sense and groups; adjectives and colours by what they describe."""

    nouns: dict[str, dict[str, str | None]]
    groups: dict[tuple[str, str], frozenset[int]]
    adjectives: dict[str, frozenset[str]]
    colours: dict[str, frozenset[str]]
    same: frozenset[frozenset[str]]


@lru_cache(maxsize=1)
def _common_words() -> _CommonWords:
    nouns: dict[str, dict[str, str | None]] = defaultdict(dict)
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    adjectives: dict[str, set[str]] = defaultdict(set)
    colours: dict[str, set[str]] = defaultdict(set)
    same: set[frozenset[str]] = set()
    section: list[str] = []
    for number, line in enumerate((_SHIPPED_DATA / "common_words.txt").read_text("utf-8").splitlines()):
        if line.startswith("["):
            section = line.strip("[]").split()
        elif line.startswith("#"):
            continue
        elif section[0] == "same":
            same.add(frozenset(line.split()))
        elif section[0] == "adjectives":
            for kind in section[1:] or sorted(_DESCRIBED):
                adjectives[kind].update(line.split())
        elif section[0] == "colours":
            for kind in section[1:] or [""]:
                colours[kind].update(line.split())
        else:
            for entry in line.split():
                word, _, sense = entry.partition("=")
                nouns[section[0]][word] = sense or nouns[section[0]].get(word)
                groups[section[0], word].add(number)
    return _CommonWords(
        dict(nouns),
        {key: frozenset(numbers) for key, numbers in groups.items()},
        {kind: frozenset(words) for kind, words in adjectives.items()},
        {kind: frozenset(words) for kind, words in colours.items()},
        frozenset(same),
    )


@lru_cache(maxsize=1)
def _tagger() -> PerceptronTagger:
    """Loads WordNet and the tagger: those of `nltk.data.path` if they are installed, else the small ones shipped."""
    missing = []
    # WordNet comes first: once our folder is on the path, it would win over a user's zipped one.
    try:
        wordnet.ensure_loaded()
    except LookupError:
        missing.append("WordNet")
        _add_shipped_data()
        wordnet.ensure_loaded()
    try:
        tagger = PerceptronTagger()
    except LookupError:
        missing.append("tagger")
        _add_shipped_data()
        tagger = PerceptronTagger()
    if missing:
        logger.warning(
            "NLTK's %s not found in nltk.data.path: edit prompts use the small data shipped with diffusers-iedit, "
            "which knows everyday words only. For the full data run "
            "`python -m nltk.downloader wordnet averaged_perceptron_tagger_eng`.",
            " and ".join(missing),
        )
    return tagger


@cache
def _add_shipped_data() -> None:
    folder = _SHIPPED_DATA
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nltk.data.find("corpora/wordnet", [str(folder)])
            nltk.data.find("taggers/averaged_perceptron_tagger_eng", [str(folder)])
    except LookupError:
        # NLTK reads nothing that another account owns or may write to, as in a checkout made with umask 002.
        folder = Path(tempfile.mkdtemp(prefix="diffusers-iedit-nltk-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for source in sorted(_SHIPPED_DATA.rglob("*")):
            copy = folder / source.relative_to(_SHIPPED_DATA)
            if source.is_dir():
                copy.mkdir(0o700)
            else:
                shutil.copyfile(source, copy)
                copy.chmod(0o600)
    nltk.data.path.append(str(folder))


def describe_data() -> str:
    """What the edits depend on besides the options: 16 hexadecimal digits over WordNet, the tagger and the word list.

    Another WordNet or tagger gives other edits, so a build pins this.
    """
    with _LOCK:
        tagger = _tagger()
        digest = hashlib.sha256((_SHIPPED_DATA / "common_words.txt").read_bytes())
        for name in _WORDNET_FILES:
            with wordnet.open(name) as file:
                digest.update(file.read().encode())
    model = [tagger.model.weights, tagger.tagdict, sorted(tagger.classes)]
    digest.update(json.dumps(model, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _ancestors(synset: Synset) -> dict[str, int]:
    """Names of the synsets above a noun's synset, with the least number of levels up; itself is at 0."""
    return _ancestors_by_name(synset.name())


@cache
def _ancestors_by_name(name: str) -> dict[str, int]:
    levels: dict[str, int] = {}
    level, current = 0, [wordnet.synset(name)]
    while current:
        current = [synset for synset in current if synset.name() not in levels]
        levels.update((synset.name(), level) for synset in current)
        current = [above for synset in current for above in synset.hypernyms()]
        level += 1
    return levels


def _is_blocked(synset: Synset) -> bool:
    uses = {use.name() for lemma in synset.lemmas() for use in lemma.usage_domains()}
    uses.update(use.name() for use in synset.usage_domains())
    return bool(uses & _BLOCKED_USES) or not _BLOCKED_KINDS.isdisjoint(_ancestors(synset))


@cache
def _sense(word: str, number: str, max_senses: int) -> Synset | None:
    """The thing that a noun names in a caption, None where it is nothing to be seen."""
    nouns = _common_words().nouns
    if word in _VAGUE or word in _BLOCKED_WORDS:
        return None
    listed = next((nouns[kind] for kind in (number, *nouns) if word in nouns[kind]), {})
    if listed.get(word):
        return wordnet.synset(listed[word])
    for synset in wordnet.synsets(word, "n")[:max_senses]:
        kind = synset.lexname().removeprefix("noun.")
        if kind == "body" and not listed:
            return None  # a shoulder is no cut of meat
        # A name ("Thames") is an instance; a person must be on the list.
        if kind in _THINGS and not synset.instance_hypernyms() and (listed or kind != "person"):
            return None if _is_blocked(synset) else synset
    return None


@cache
def _kind(word: str, number: str, max_senses: int) -> str | None:
    """The lexicographer file ("animal", "artifact" ...) of what an adjective describes, None where it is unseen."""
    # The young do not get old, nor the small large: "a little girl".
    if word in _CHILDREN or (word in _VAGUE and word not in ("grass", "sky")):
        return None
    if (thing := _sense(word, number, max_senses)) is None:
        senses = wordnet.synsets(word, "n")
        if not senses or senses[0].instance_hypernyms():
            return None
        thing = senses[0]
    kind = thing.lexname().removeprefix("noun.")
    return kind if kind in _DESCRIBED else None


@lru_cache(maxsize=16)
def _targets(
    vocabulary: frozenset[str] | None, common_words: bool, min_count: int, max_senses: int
) -> dict[str, list[tuple[str, str, Synset]]]:
    """Synset name -> the nouns below it that may replace others: (word, number, synset)."""
    listed = _common_words().nouns
    words = []
    if vocabulary is not None:
        for word in sorted({name.lower().replace(" ", "_") for name in vocabulary} - _common_words().colours[""]):
            words += [(word, number) for number in listed if word in listed[number]] or [(word, "count")]
    elif common_words:
        words = [(word, number) for number in sorted(listed) for word in sorted(listed[number])]
    found = [(word, number, _sense(word, number, max_senses)) for word, number in words]
    if vocabulary is None and not common_words:
        for synset in wordnet.all_synsets("n"):
            for lemma in synset.lemmas() if synset.lexname().removeprefix("noun.") in _THINGS else ():
                word = lemma.name()
                is_used = word.islower() and word.isalpha() and not _colour(word) and lemma.count() >= min_count
                if is_used and _sense(word, "count", max_senses) == synset:
                    found.append((word, "mass" if word in listed["mass"] else "count", synset))
        found.sort(key=lambda entry: entry[:2])
    targets = defaultdict(list)
    for word, number, synset in found:
        if synset is not None:
            for name in _ancestors(synset):
                targets[name].append((word, number, synset))
    return targets


@lru_cache(maxsize=1)
def _listed_synsets() -> dict[str, frozenset[int]]:
    """The synsets of the listed nouns, by name, with the groups they are in."""
    common = _common_words()
    groups: dict[str, frozenset[int]] = defaultdict(frozenset)
    for number, words in common.nouns.items():
        for word in words:
            if (synset := _sense(word, number, EditOptions.max_senses)) is not None:
                groups[synset.name()] |= common.groups[number, word]
    return groups


@lru_cache(maxsize=100_000)
def _co_hyponyms(word: str, number: str, options: EditOptions) -> tuple[str, ...]:
    """What a noun may become, in alphabetical order."""
    if (source := _sense(word, number, options.max_senses)) is None:
        return ()
    is_person = source.lexname() == "noun.person"
    if is_person and not options.people:
        return ()
    common, lineage, groups = _common_words(), _ancestors(source), None
    above = lineage
    if options.vocabulary is None and options.common_words:
        listed = _listed_synsets()
        known = min((name for name in lineage if name in listed), key=lambda name: (lineage[name], name), default=None)
        if known is None:
            return ()
        # "labrador" is a dog, and what may stand in a dog's place may stand in its.
        above, groups = _ancestors_by_name(known), listed[known]
    targets = _targets(options.vocabulary, options.common_words, options.min_count, options.max_senses)
    chosen = set()
    for level in range(1, options.max_hypernym_levels + 1):
        for name in (name for name, levels_up in above.items() if levels_up == level):
            for target, target_number, synset in targets.get(name, ()):
                if (
                    target_number == number
                    # Without the list's groups, what is as far below as the source: no "apparatus" for a fork.
                    and (groups is not None or options.vocabulary is not None or _ancestors(synset)[name] <= level)
                    and synset.name() not in lineage
                    and source.name() not in _ancestors(synset)
                    and frozenset((word, target)) not in common.same
                    and (synset.lexname() == "noun.person") == is_person
                    and (groups is None or not groups.isdisjoint(common.groups[number, target]))
                ):
                    chosen.add(target)
        if len(chosen) >= options.min_choices:
            break
    return tuple(sorted(chosen))


@cache
def _colour(word: str) -> Synset | None:
    """The colour that a word names, through its noun: WordNet's adjectives have no hypernyms."""
    senses = wordnet.synsets(word, "n") if wordnet.synsets(word, "a") else []
    colours = [sense for sense in senses if "color.n.01" in _ancestors(sense)]
    return colours[0] if colours else None


@lru_cache(maxsize=100_000)
def _other_adjectives(word: str, kind: str, options: EditOptions) -> tuple[str, ...]:
    """What an adjective may become when it describes a thing of this kind, in alphabetical order."""
    common = _common_words()
    if (colour := _colour(word)) is not None:
        if kind == "person":
            return ()
        names = common.colours[""]
        if options.vocabulary is not None:
            # A rose is a thing before it is a colour.
            allowed = frozenset(
                name for name in options.vocabulary if name in names or not _sense(name, "count", options.max_senses)
            )
        else:
            allowed = common.colours[kind] if options.natural_colours and kind in common.colours else names
        return tuple(
            other
            for other in sorted(allowed)
            if (synset := _colour(other)) is not None
            and synset.name() not in _ancestors(colour)
            and colour.name() not in _ancestors(synset)
        )
    antonyms: set[str] = set()
    for synset in wordnet.synsets(word, "a")[: options.max_senses]:
        # "tiny" has no antonym itself, but is similar to "small", which has.
        direct = [antonym for lemma in synset.lemmas() for antonym in lemma.antonyms()]
        heads = synset.similar_tos() if synset.pos() == "s" else []
        indirect = [antonym for head in heads for lemma in head.lemmas() for antonym in lemma.antonyms()]
        antonyms.update(antonym.name().lower() for antonym in direct or indirect)
    allowed = common.adjectives.get(kind, frozenset()) if options.vocabulary is None else options.vocabulary
    return tuple(sorted(antonyms & allowed))


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int
    tag: str

    @property
    def word(self) -> str:
        return self.text.lower()


@dataclass(frozen=True)
class _Noun:
    """A noun or a compound of a caption: its tokens, its WordNet word, and whether it is one, several or a mass."""

    first: int
    last: int
    word: str
    number: str
    is_plural: bool


@dataclass(frozen=True)
class _Change:
    """One thing that may change: characters [start, end) become one of `others`; the term begins and ends as given."""

    start: int
    end: int
    term_start: int
    term_end: int
    is_plural: bool
    others: tuple[str, ...]


def _tag(caption: str) -> list[_Token]:
    matches = list(re.finditer(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[^\s]", caption))
    words = [match.group().lower() for match in matches]
    tags = [tag for _, tag in _tagger().tag(words)]
    colours = _common_words().colours[""]
    for index, word in enumerate(words):
        if not word.isascii() or not word[0].isalnum():
            tags[index] = "SYM"  # to a tagger of English an emoji or a Chinese word is most likely a noun
        elif word in colours and tags[index] == "NN" and tags[index + 1 : index + 2] in (["NN"], ["NNS"], ["JJ"]):
            tags[index] = "JJ"  # taggers waver between the two
    return [_Token(m.group(), m.start(), m.end(), tag) for m, tag in zip(matches, tags, strict=True)]


@lru_cache(maxsize=100_000)
def _lemma(words: tuple[str, ...]) -> str | None:
    """The noun of the word list or of WordNet that these words spell, in the singular, joined by underscores."""
    listed = _common_words().nouns
    # Some plurals are words of their own: to WordNet "men" are a work force first.
    for last in (words[-1], _SINGULARS.get(words[-1]), wordnet.morphy(words[-1], "n")):
        if last is not None:
            word = "_".join((*words[:-1], last))
            if any(word in nouns for nouns in listed.values()):
                return word
    return wordnet.morphy("_".join(words), "n")


def _starts_noun(tokens: list[_Token], index: int) -> bool:
    return index < len(tokens) and tokens[index].tag in ("NN", "NNS")


def _is_name(tokens: list[_Token], index: int) -> bool:
    return index > 0 and tokens[index].text[0].isupper() and not _is_title(tokens)


def _is_title(tokens: list[_Token]) -> bool:
    # "Man On A Horse": capitals say nothing here.
    return tokens[0].text[0].isupper() and 2 * sum(token.text[0].isupper() for token in tokens) > len(tokens)


def _find_nouns(caption: str, tokens: list[_Token]) -> list[_Noun]:
    """The nouns that may be changed: heads of their phrases, compounds as a whole."""
    nouns, index = [], 0
    while index < len(tokens):
        size = next((size for size in (3, 2) if _is_compound(caption, tokens[index : index + size], size)), 1)
        last = index + size - 1
        if _starts_noun(tokens, last) and not _starts_noun(tokens, last + 1) and not _is_name(tokens, index):
            words = tuple(token.word for token in tokens[index : last + 1])
            if (word := _lemma(words)) is not None:
                nouns.append(_describe_number(tokens, index, last, word))
        index += size
    return nouns


def _is_compound(caption: str, tokens: list[_Token], size: int) -> bool:
    if len(tokens) < size or tokens[-1].tag not in ("NN", "NNS") or tokens[0].word in _FREE_ADJECTIVES:
        return False
    if not all(token.tag.startswith(("NN", "JJ", "VB", "CD")) and token.text[0].isalpha() for token in tokens):
        return False
    if any(caption[left.end : right.start] != " " for left, right in pairwise(tokens)):
        return False
    word = _lemma(tuple(token.word for token in tokens))
    if word is None or any(word in nouns for nouns in _common_words().nouns.values()):
        return word is not None
    senses = wordnet.synsets(word, "n")
    if _colour(tokens[0].word):
        # A black bear is a kind of bear, but a black cat no more than a cat that is black.
        head = _lemma((tokens[-1].word,))
        kinds = {name for sense in senses for name, level in _ancestors(sense).items() if level > 0}
        return any(sense.name() in kinds for sense in wordnet.synsets(head, "n")) if head else True
    # "an oval office" is not the Oval Office.
    names = [name for sense in senses for name in sense.lemma_names() if name.lower() == word]
    return tokens[0].tag != "JJ" or any(name.islower() for name in names)


def _describe_number(tokens: list[_Token], first: int, last: int, word: str) -> _Noun:
    listed = _common_words().nouns
    surface = "_".join(token.word for token in tokens[first : last + 1])
    phrase = first
    while phrase > 0 and tokens[phrase - 1].tag in ("JJ", "VBN", "VBG", "NN"):
        phrase -= 1
    before = [token.word for token in tokens[max(phrase - 2, 0) : phrase]]
    is_counted = before[-1:] != [] and (before[-1] in _NUMBERS or (before[-1].isdigit() and before[-1] != "1"))
    is_counted = is_counted or (len(before) == 2 and before[0] in _COLLECTIONS and before[1] == "of")
    followed_by_of = last + 1 < len(tokens) and tokens[last + 1].word == "of"
    if surface in listed["plural"] and not is_counted and not followed_by_of:
        return _Noun(first, last, surface, "plural", is_plural=False)
    word = surface if word == surface and surface not in listed["plural"] else _singular(word)
    is_bare = before[-1:] == [] or tokens[phrase - 1].tag in ("IN", "CC", "VBG", "VBZ", "SYM")
    is_counted = is_counted or (is_bare and word not in listed["mass"])
    is_plural = surface != word or (is_counted and _plural(word) == word)
    if is_plural or before[-1:] in (["a"], ["an"]):
        number = "count"
    else:
        number = "mass" if word in listed["mass"] else "count"
    return _Noun(first, last, word, number, is_plural)


def _singular(word: str) -> str:
    # "glasses" is a word of WordNet; where it is counted it is the plural of "glass".
    stems = [word[:-2], word[:-1]] if word.endswith("es") else [word[:-1]]
    return next((stem for stem in stems if word.endswith("s") and wordnet.synsets(stem, "n")), word)


def _find_changes(caption: str, tokens: list[_Token], options: EditOptions) -> tuple[list[_Change], list[_Change]]:
    """Every adjective and every noun that may change, in the order of the caption; those without a replacement too."""

    def is_open(word: str) -> bool:
        spelt = word.replace("_", " ")
        return spelt not in options.keep and (options.vocabulary is None or spelt in options.vocabulary)

    nouns = _find_nouns(caption, tokens)
    in_compound = {index for noun in nouns for index in range(noun.first, noun.last + 1)}
    present = {token.word for token in tokens} | {noun.word for noun in nouns}

    def absent(others: tuple[str, ...]) -> tuple[str, ...]:
        # "a cat and a dog" does not become "a cat and a cat", nor "blue and red" "blue and blue".
        return tuple(other for other in others if not {other, _plural(other)} & present)

    has_gender = any(token.word in _GENDERED for token in tokens)
    adjective_changes, noun_changes = [], []
    for index, token in enumerate(tokens):
        if token.tag != "JJ" or index in in_compound or _is_name(tokens, index):
            continue
        if (noun := _described(tokens, nouns, index)) is None or not (is_open(token.word) and is_open(noun.word)):
            continue
        kind = _kind(noun.word, noun.number, options.max_senses)
        if kind is not None:
            others = absent(_other_adjectives(token.word, kind, options))
            end = tokens[noun.last].end
            adjective_changes.append(_Change(token.start, token.end, token.start, end, False, others))
    for noun in nouns:
        thing = _sense(noun.word, noun.number, options.max_senses)
        if thing is None or not is_open(noun.word):
            continue
        if thing.lexname() == "noun.person" and has_gender:
            continue
        before = tokens[noun.first - 1] if noun.first else None
        if before is not None and before.tag == "NN" and before.word not in _MATERIALS:
            continue  # "a tennis player" must not become "a tennis golfer"
        first = noun.first
        if [other.word for other in nouns].count(noun.word) > 1:
            # Only its adjectives tell this one from the others: "white dog" beside a black dog.
            while first > 0 and tokens[first - 1].tag == "JJ":
                first -= 1
        start, end = tokens[noun.first].start, tokens[noun.last].end
        others = absent(_co_hyponyms(noun.word, noun.number, options))
        noun_changes.append(_Change(start, end, tokens[first].start, end, noun.is_plural, others))
    return adjective_changes, noun_changes


def _described(tokens: list[_Token], nouns: list[_Noun], adjective: int) -> _Noun | None:
    """The noun that an adjective stands before, across adjectives, "and" and nouns ("red and white tour bus")."""
    for index in range(adjective + 1, len(tokens)):
        for noun in nouns:
            if noun.first == index:
                return noun
        following = tokens[index + 1].tag if index + 1 < len(tokens) else ""
        is_joint = tokens[index].word in ("and", ",") and following == "JJ"
        is_modifier = tokens[index].tag in ("JJ", "VBN") or (tokens[index].tag == "NN" and following in ("NN", "NNS"))
        if not (is_joint or is_modifier):
            return None
    return None


def _plural(word: str) -> str:
    head, _, last = word.rpartition(" ")
    if last in _IRREGULAR_PLURALS:
        last = _IRREGULAR_PLURALS[last]
    elif last.endswith("man") and last not in ("german", "roman", "shaman"):
        last = f"{last[:-3]}men"
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last = f"{last}es"
    else:
        last = f"{last}s"
    return f"{head} {last}".lstrip()


def _match_case(word: str, model: str, in_title: bool) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    if model[0].isupper():
        return word.title() if in_title else word[0].upper() + word[1:]
    return word


def _apply(caption: str, tokens: list[_Token], change: _Change, other: str) -> Edit:
    other, in_title = other.replace("_", " "), _is_title(tokens)
    other = _match_case(_plural(other) if change.is_plural else other, caption[change.start : change.end], in_title)
    before = caption[: change.start]
    article = next(
        (
            token
            for token in tokens
            if token.end < change.start and token.word in ("a", "an") and caption[token.end : change.start].isspace()
        ),
        None,
    )
    if article is not None:
        form = "an" if _VOWEL_SOUND.match(other.lower()) else "a"
        if form != article.word:
            before = before[: article.start] + _match_case(form, article.text, in_title) + before[article.end :]
            if article.text == "A" and other.isupper() and len(other) > 1:
                before = before[: article.start] + form.upper() + before[article.start + len(form) :]
    shift = len(before) - change.start
    prompt = before + other + caption[change.end :]
    term_end = change.term_end + shift + len(other) - (change.end - change.start)
    return Edit(prompt, caption[change.term_start : change.term_end], prompt[change.term_start + shift : term_end])


def find_edit(caption: str, seed: int, options: EditOptions = EditOptions()) -> Edit | str:
    """`make_edit` that says why a caption has no edit.

    Returns:
        `Edit` or `str`: The edit, or `"empty_caption"`, `"too_long"`, `"unsafe_caption"` (nudity, violence, slurs),
        `"nothing_to_change"` (no visible thing that the options let change) or `"no_replacement"` (nothing to change
        it to).
    """
    if not caption.strip():
        return "empty_caption"
    if len(caption) > options.max_length:
        return "too_long"
    with _LOCK:
        tokens = _tag(caption)
        adjectives, nouns = _find_changes(caption, tokens, options)
    if any(token.word in _UNSAFE or token.word in _BLOCKED_WORDS for token in tokens):
        return "unsafe_caption"
    groups = [adjectives if options.adjectives else [], nouns if options.nouns else []]
    if not any(groups):
        return "nothing_to_change"
    groups = [[change for change in group if change.others] for group in groups]
    if not any(groups):
        return "no_replacement"
    # Of all methods of `random`, only random() is promised to give the same numbers in every version of Python.
    rng = random.Random(seed)
    adjectives, nouns = groups
    prefers_adjective = rng.random() < options.adjective_share
    changes = (adjectives or nouns) if prefers_adjective else (nouns or adjectives)
    change = changes[int(rng.random() * len(changes))]
    return _apply(caption, tokens, change, change.others[int(rng.random() * len(change.others))])


def make_edit(caption: str, seed: int, options: EditOptions = EditOptions()) -> Edit | None:
    """Changes one noun or adjective of a caption (Sec. 3.1).

    A noun becomes a random co-hyponym of WordNet ("bus" -> "train"), a colour another colour, another adjective its
    antonym. Number, article and capitals follow; all other characters stay as they are. The terms name the change in
    either image: the noun, or the adjective with the noun it describes ("red car", "blue car", Sec. 3.4).

    Args:
        caption (`str`): The caption of the source image, in English.
        seed (`int`): The same caption, seed and options give the same edit on every machine with the same data
            (`describe_data`).
        options (`EditOptions`): The filters.

    Returns:
        `Edit` or `None`: None where nothing in the caption can be changed; `find_edit` says why.
    """
    edit = find_edit(caption, seed, options)
    return edit if isinstance(edit, Edit) else None


class EditPrompts:
    """The stage: captions to edit prompts.

    Args:
        seed (`int`): Seed of the whole data set. Each row's own seed comes from it and the row's id, so that neither
            order nor sharding matters.
        options (`EditOptions`): The filters.
    """

    def __init__(self, seed: int = 0, options: EditOptions = EditOptions()):
        self.seed, self.options = seed, options

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Edits a batch of rows.

        Args:
            batch (`dict[str, list[str]]`): Columns `id` and `caption`.

        Returns:
            `dict[str, list]`: `edit_prompt`, `source_term` and `target_term`, None where a row is dropped, and
            `dropped`, `find_edit`'s reason there and None elsewhere.
        """
        columns: dict[str, list] = {"edit_prompt": [], "source_term": [], "target_term": [], "dropped": []}
        for row_id, caption in zip(batch["id"], batch["caption"], strict=True):
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{row_id}".encode()).digest()[:8], "big")
            edit = find_edit(caption, seed, self.options)
            if isinstance(edit, Edit):
                row = [edit.prompt, edit.source_term, edit.target_term, None]
            else:
                row = [None, None, None, edit]
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        return columns
