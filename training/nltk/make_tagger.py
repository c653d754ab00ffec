"""Trains the small part-of-speech tagger that ships with the package: NLTK's perceptron on made-up captions.

    python training/nltk/make_tagger.py

The captions come from a small grammar of how image captioners write, over the words of the shipped WordNet
(make_wordnet.py) and the closed classes of English. Nothing is downloaded, and the result is the same every time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

import nltk.data
from nltk.corpus import wordnet
from nltk.tag import PerceptronTagger


PACKAGE_DATA = Path(__file__).parents[2] / "src" / "diffusers_iedit" / "pairs" / "nltk_data"
TAGGER = Path("taggers") / "averaged_perceptron_tagger_eng"

VISIBLE = {"noun.animal", "noun.artifact", "noun.food", "noun.object", "noun.person", "noun.plant"}

ADJECTIVES = (
    "red orange yellow green blue purple pink brown black white gray grey golden silver beige colorful big large "
    "huge little small tiny tall short long high low wide narrow thick thin young old new modern ancient vintage "
    "wet dry clean dirty open closed empty full bright dark light hot cold warm cool round square flat wooden metal "
    "plastic stone brick concrete leather glass floral striped snowy sunny cloudy rainy sandy rocky grassy happy "
    "sad sleepy cute beautiful pretty fluffy furry shiny fancy rustic busy crowded quiet calm deep shallow rough "
    "smooth soft hard fresh ripe raw sliced cooked whole indoor outdoor urban rural tropical male female "
    "close different various other same next single double arafed blurry clear blonde bald asian traditional "
    "electric healthy delicious sweet hairy bare heavy nice great good bad wild steep curved abstract digital "
    "stuffed antique"
).split()

# Nouns that captions use besides what can be edited.
SCENERY = (
    "background foreground front top side back middle end edge corner view picture photo image photograph close-up "
    "group couple bunch pair piece kind bit set row line pile stack lot number variety display scene area field "
    "court park city town room counter floor ceiling ground grass sky water snow sand dirt wave air sunset sunrise "
    "night day camera hair face hand head eye leg tail wing mouth beard people person player family crowd herd "
    "flock food meal dinner fruit vegetable meat furniture equipment luggage traffic track station sidewalk runway "
    "yard intersection parking sign screen light shadow reflection design pattern logo text name word game match "
    "birthday wedding party frosting icing stuffing painting building railing awning baseball tennis soccer brick "
    "decker topping slice bowl plate cup glass stand sea ocean shore trail path rail pole wire leaf branch trunk "
    "rock stone log wood metal"
).split()
PLURAL_ONLY = (
    "people sunglasses glasses jeans shorts pants scissors goggles clothes leggings men women children mice geese "
    "teeth feet sheep deer fish cattle skis"
).split()
NO_ARTICLE = (
    "grass snow water sand dirt food fruit meat broccoli rice pasta bread cheese chocolate coffee tea wine beer "
    "milk soup salad lettuce corn fish chicken furniture luggage traffic clothing hair wood metal ice"
).split()
MODIFIERS = (
    "brick city tour passenger baseball tennis soccer football kitchen bathroom bedroom office hotel street beach "
    "park mountain forest garden wedding birthday chocolate cheese fruit pizza dog cat toy fire police traffic stop "
    "computer cell coffee wine dining living double train bus truck car airplane decker stone glass christmas"
).split()

# base, third person, -ing, past participle are spelt by rule; a verb that doubles its consonant ends in "+".
TRANSITIVE = (
    "ride hold eat wear carry watch throw hit+ catch chase kick pull push feed pet+ play read use cut+ cook pour "
    "drink touch hug+ kiss lick sniff bite cross serve swing display show cover fill surround decorate prepare fix "
    "paint draw brush wash clean walk drive fly herd tow chew open"
).split()
INTRANSITIVE = (
    "sit+ stand walk run+ lie lay sleep play swim+ fly jump sail drive park travel move skate ski surf float graze "
    "rest lean look smile pose wait work hang climb dance swing grow perch drink eat talk relax laugh stare roll"
).split()
# Seldom used, so that the tagger learns their endings and not the words.
RARE_VERBS = (
    "pray kneel shout sing yawn sneeze cheer crawl wander march stroll gallop trot stretch scratch juggle wrestle box "
    "argue whisper point wave sweep mow rake dig plant water paddle row dive float snorkel hike camp fish hunt bathe "
    "shower shave comb knit sew type write study teach ponder meditate salute bow clap tumble slide bounce pitch "
    "dribble pass tackle race cycle jog hop leap soar hover glide nest howl bark purr growl hiss peck bask doze nap "
    "snooze wink frown cry weep sob grin blow inflate melt burn smoke boil fry bake roast grill peel slice chop stir "
    "mix knead unload load stack lift haul tug steer tow dock anchor spray splash soak drip leak shine glow reflect"
).split()
PARTICIPLES = (
    "parked covered filled topped surrounded decorated painted made sliced stacked stuffed dressed seated lined "
    "placed cut tied mounted attached shown displayed lit arranged wrapped carved loaded located folded grilled "
    "fried baked perched docked crowded served buried hung set piled"
).split()
PREPOSITIONS = (
    "in on at with under over near by behind beside through along across around above below from into"
).split()
LONG_PREPOSITIONS = (
    "next to",
    "in front of",
    "on top of",
    "close to",
    "on the side of",
    "in the middle of",
    "inside of",
)
NUMBERS = "two three four five six seven eight ten several many some".split()


def inflect(verb: str) -> dict[str, str]:
    """A verb's forms by tag: "ride" -> rides, riding, ride."""
    base = verb.rstrip("+")
    stem = base + base[-1] if verb.endswith("+") else base
    if base == "lie":
        ing = "lying"
    else:
        ing = (stem[:-1] if stem.endswith("e") else stem) + "ing"
    s = base[:-1] + "ies" if base.endswith("y") and base[-2] not in "aeiou" else base
    s = s if s.endswith("ies") else base + ("es" if base.endswith(("s", "x", "z", "ch", "sh")) else "s")
    return {"VBP": base, "VBZ": s, "VBG": ing}


def pluralise(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("fe"):
        return noun[:-2] + "ves"
    if noun.endswith("man"):
        return noun[:-2] + "en"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


class Captions:
    """A random grammar of captions: lists of (word, tag)."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        section, self.things = "", []
        for line in (PACKAGE_DATA / "common_words.txt").read_text("utf-8").splitlines():
            if line.startswith("["):
                section = line
            elif section in ("[count]", "[mass]"):
                self.things += [entry.partition("=")[0] for entry in line.split()]
        seen = {*self.things, *SCENERY, *PLURAL_ONLY}
        verbs = {form for verb in (*TRANSITIVE, *INTRANSITIVE) for form in inflect(verb).values()}
        rare_verbs = {form for verb in RARE_VERBS for form in inflect(verb).values()}
        nouns, adjectives = set(), set()
        for synset in wordnet.all_synsets("n"):
            if synset.lexname() in VISIBLE and not synset.instance_hypernyms():
                nouns.update(name for name in synset.lemma_names() if name.islower() and name.isalpha())
        for synset in wordnet.all_synsets("a"):
            adjectives.update(name for name in synset.lemma_names() if name.islower() and name.isalpha())
        used_as_noun = {word for word in adjectives if wordnet.synsets(word, "n")}
        self.rare_nouns = sorted(nouns - seen - verbs - rare_verbs - adjectives - set(PARTICIPLES))
        self.rare_adjectives = sorted(adjectives - used_as_noun - set(ADJECTIVES) - set(PARTICIPLES))

    def pick(self, options):
        return options[int(self.rng.random() * len(options))]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def noun(self) -> str:
        draw = self.rng.random()
        return self.pick(self.things if draw < 0.55 else SCENERY if draw < 0.8 else self.rare_nouns)

    def describe(self) -> list[tuple[str, str]]:
        words = []
        if self.chance(0.05):
            words.append((self.pick(("very", "brightly", "dimly", "light", "dark")), "RB"))
        if self.chance(0.5):
            words.append((self.pick(ADJECTIVES if self.chance(0.85) else self.rare_adjectives), "JJ"))
            if self.chance(0.12):
                words += [("and", "CC"), (self.pick(ADJECTIVES[:16]), "JJ")]
            elif self.chance(0.2):
                words.append((self.pick(ADJECTIVES[:60]), "JJ"))
        elif self.chance(0.08):
            words.append((self.pick(PARTICIPLES), "VBN"))
        if self.chance(0.14):
            words.append((self.pick(MODIFIERS), "NN"))
        return words

    def singular(self) -> list[tuple[str, str]]:
        described = self.describe()
        nouns = [(word, "NN") for word in self.noun().split("_")]
        words = [*described, *nouns]
        draw = self.rng.random()
        if draw < 0.6:
            first = "an" if words[0][0][0] in "aeiou" else "a"
            return [(first, "DT"), *words]
        if draw < 0.85:
            return [(self.pick(("the", "this", "another", "each")), "DT"), *words]
        return [(self.pick(("his", "her", "its", "their")), "PRP$"), *words] if draw < 0.92 else words

    def plural(self) -> list[tuple[str, str]]:
        if self.chance(0.25):
            nouns = [(self.pick(PLURAL_ONLY), "NNS")]
        else:
            *modifiers, last = self.noun().split("_")
            nouns = [*((word, "NN") for word in modifiers), (pluralise(last), "NNS")]
        words = [*self.describe(), *nouns]
        draw = self.rng.random()
        if draw < 0.3:
            number = self.pick(NUMBERS)
            return [(number, "JJ" if number in ("several", "many") else "DT" if number == "some" else "CD"), *words]
        if draw < 0.45:
            group = self.pick(("group", "bunch", "couple", "pair", "herd", "pile", "row"))
            return [("a", "DT"), (group, "NN"), ("of", "IN"), *words]
        return [(self.pick(("the", "some")), "DT"), *words] if draw < 0.6 else words

    def thing(self) -> tuple[list[tuple[str, str]], bool]:
        """A noun phrase, and whether it is plural."""
        draw = self.rng.random()
        if draw < 0.62:
            words, plural = self.singular(), False
        elif draw < 0.92:
            words, plural = self.plural(), True
        else:
            words, plural = [*self.describe(), (self.pick(NO_ARTICLE), "NN")], False
        if self.chance(0.08):
            words += [("of", "IN"), *self.pick((self.singular, self.plural))()]
        return words, plural

    def place(self) -> list[tuple[str, str]]:
        if self.chance(0.1):
            return [("in", "IN"), ("the", "DT"), (self.pick(("background", "foreground", "air", "sky")), "NN")]
        if self.chance(0.25):
            tags = {
                "next": "JJ",
                "close": "JJ",
                "front": "NN",
                "top": "NN",
                "side": "NN",
                "middle": "NN",
                "to": "TO",
                "the": "DT",
            }
            words = [(word, tags.get(word, "IN")) for word in self.pick(LONG_PREPOSITIONS).split()]
        else:
            words = [(self.pick(PREPOSITIONS), "IN")]
        return words + self.thing()[0]

    def action(self, tag: str) -> list[tuple[str, str]]:
        if self.chance(0.45):
            verb = self.pick(RARE_VERBS if self.chance(0.08) else TRANSITIVE)
            words = [(inflect(verb)[tag], tag), *self.thing()[0]]
            return words + (self.place() if self.chance(0.5) else [])
        verb = self.pick(RARE_VERBS if self.chance(0.08) else INTRANSITIVE)
        words = [(inflect(verb)[tag], tag)]
        if self.chance(0.15):
            return words
        if self.chance(0.2):
            words.append((self.pick(("down", "up", "off", "out", "together", "outside")), "RP"))
        return words + self.place()

    def predicate(self, plural: bool) -> list[tuple[str, str]]:
        draw = self.rng.random()
        be = ("are", "VBP") if plural else ("is", "VBZ")
        if draw < 0.35:
            return self.action("VBG")
        if draw < 0.5:
            return [be, *self.action("VBG")]
        if draw < 0.6:
            return [("that", "WDT"), be, *self.action("VBG")]
        if draw < 0.68:
            return self.action("VBP" if plural else "VBZ")
        if draw < 0.78:
            return [(self.pick(PARTICIPLES), "VBN"), *self.place()]
        if draw < 0.82:
            return [be, (self.pick(ADJECTIVES[:80]), "JJ")]
        if draw < 0.84:
            return [("that", "WDT"), ("says", "VBZ"), (self.noun().partition("_")[0], "NN")]
        if draw < 0.87:
            return [("with", "IN"), *self.thing()[0], ("on", "IN"), ("it", "PRP")]
        if draw < 0.88:
            return [("with", "IN"), ("each", "DT"), ("other", "JJ")]
        return self.place() + (self.place() if self.chance(0.4) else [])

    def caption(self) -> list[tuple[str, str]]:
        words, plural = self.thing()
        draw = self.rng.random()
        if draw < 0.12:
            words = [("there", "EX"), ("are", "VBP") if plural else ("is", "VBZ"), *words]
        elif draw < 0.2:
            words = [("a", "DT"), ("close", "JJ"), ("up", "RP"), ("of", "IN"), *words]
        elif draw < 0.28:
            start = self.pick(("a photo of", "a picture of", "an image of", "a view of", "a painting of"))
            article, kind, of = start.split()
            words = [(article, "DT"), (kind, "NN"), (of, "IN"), *words]
        if self.chance(0.1):
            words += [("and", "CC"), *self.thing()[0]]
        if self.chance(0.88):
            words += self.predicate(plural)
        if self.chance(0.08):
            words += [(self.pick(("and", "while")), "CC"), *self.action("VBG")]
        if self.chance(0.06):
            words += [(",", ","), *self.thing()[0]]
        return [*words, (".", ".")] if self.chance(0.15) else words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--captions", type=int, default=20_000, help="number of captions to train on")
    parser.add_argument("--output_dir", type=Path, default=PACKAGE_DATA / TAGGER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # The shipped WordNet, not one that this machine has besides. NLTK writes only below a folder of its path.
    work = Path(tempfile.mkdtemp())
    nltk.data.path[:] = [str(PACKAGE_DATA), str(work)]
    random.seed(args.seed)  # PerceptronTagger shuffles with the global generator
    tagger = PerceptronTagger(load=False)
    generator = Captions(args.seed)
    tagger.train([generator.caption() for _ in range(args.captions)], nr_iter=5)
    tagger.save_to_json(lang="eng", loc=str(work / "tagger"))

    test = Captions(args.seed + 1)
    print(f"accuracy on 2000 fresh captions: {tagger.accuracy([test.caption() for _ in range(2000)]):.4f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    size = 0
    for file in sorted((work / "tagger").iterdir()):
        content = json.loads(file.read_text("utf-8"))
        # NLTK writes the classes, a set, in whatever order this process has, and features without effect too.
        if isinstance(content, list):
            content = sorted(content)
        elif "weights" in file.name:
            content = {feature: weights for feature, weights in content.items() if weights}
        text = json.dumps(content, separators=(",", ":"), sort_keys=True) + "\n"
        partial = args.output_dir / f".{file.name}.partial"
        partial.write_text(text, "utf-8")
        os.replace(partial, args.output_dir / file.name)
        size += len(text)
    print(f"{size / 1e6:.2f} MB in {args.output_dir}")


if __name__ == "__main__":
    main()
