"""Training data of mini-llama: the tasks of the miniature world with every image replaced by its description.

The layout is that of the later stages, with a description instead of `<image>`: first what is seen, then the question.
Where the later stages answer with an image, the text asks for its description, so that mini-llama learns the meaning of
drawing prompts, edits and facts, and only drawing is left to learn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from metamorph.miniature.world import changes, knowledge, language
from metamorph.miniature.world.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    is_reserved,
    sample_scene,
)


Conversation = list[dict[str, str]]

_MAX_QUESTIONS = 6
_PAIR_FRACTION = 0.5
_TASK_SHARES = {
    "questions": 0.44,
    "list": 0.08,
    "caption": 0.06,
    "edit": 0.12,
    "next_frame": 0.04,
    "drawing": 0.08,
    "knowledge": 0.06,
    "facts": 0.12,
}
_LIST_QUESTIONS = 5
_LIST_COUNT_SHARE = 0.25
_COUNT_WHAT_IS_THERE = 0.7
_ATTRIBUTES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "position": POSITIONS}
_TEMPLATES = (
    language.CAPTIONS,
    language.CAPTION_REQUESTS,
    language.ATTRIBUTE_QUESTIONS.values(),
    (language.COUNT_QUESTION, language.EXISTENCE_QUESTION, language.PROPERTY_QUESTION, knowledge.FACT_CHECK),
    language.DRAWING_PROMPTS,
    knowledge.COLOUR_FACT_QUESTIONS,
    knowledge.SHAPE_FACT_QUESTIONS,
    knowledge.FACT_REQUESTS,
    knowledge.COLOUR_PROMPTS,
    knowledge.SHAPE_PROMPTS,
    knowledge.THING_PROMPTS,
    changes.NEXT_FRAME_PROMPTS,
    *changes.EDIT_TEMPLATES.values(),
)
_GRAMMAR_WORDS = ("a", "an", "the", "and", "in", "on", "object", "objects", "it", "yes", "no", "background")


@dataclass(frozen=True)
class TextTask:
    """One request with its one right answer."""

    kind: str
    """The question's type, or the name of the task."""
    request: str
    """What the user says, the description included."""
    answer: str
    """What the assistant must say, word for word."""
    is_question: bool
    """Whether it is a question about a scene, as opposed to an instruction or a fact."""
    num_objects: int = 0
    """Objects of the scene that a question is about."""

    def conversation(self) -> Conversation:
        """The task as one exchange."""
        return _exchange(self.request, self.answer)


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a text, without image markers."""
    return re.findall(r"[A-Za-z]+|[.,?]", text.replace("<image>", " "))


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the world's texts, sorted; capitalised if a sentence can begin with it."""
    templates = [template for group in _TEMPLATES for template in group]
    texts = [re.sub(r"\{\w+\}", " ", template) for template in templates]
    for group in (SHAPES, COLORS, SIZES, POSITIONS, BACKGROUNDS, language.NUMBERS, language.PLURALS.values()):
        texts += group
    texts += [*language.COLOUR_WORDS, *_GRAMMAR_WORDS, ". ?", *(thing.name for thing in knowledge.THINGS)]
    words = {word for text in texts for word in words_of(text)}
    return sorted(words | {template.split()[0].capitalize() for template in templates if template[0].isalpha()})


def build_vocabulary() -> list[str]:
    """The words of the world, and those that begin a description with a capital."""
    return [*vocabulary(), "A", "An"]


def training_conversation(rng: np.random.Generator) -> Conversation:
    """Sample a conversation. Scenes reserved for evaluation never occur."""
    task = str(rng.choice(list(_TASK_SHARES), p=list(_TASK_SHARES.values())))
    if task == "list":
        return list_conversation(rng, count_share=_LIST_COUNT_SHARE)
    if task == "questions":
        return _question_conversation(sample_scene(rng, pair_fraction=_PAIR_FRACTION), rng)
    if task == "facts":
        return fact_conversation(rng)
    if task == "caption":
        scene = sample_scene(rng, pair_fraction=_PAIR_FRACTION)
        return _exchange(_lines(_described(scene, rng), _caption_request(rng)), language.caption(scene, rng))
    while True:
        request, scenes = _imagined(task, rng)
        if not any(map(is_reserved, scenes)):
            return _exchange(request, _plain_caption(scenes[-1], rng))


def fact_conversation(rng: np.random.Generator) -> Conversation:
    """A question about a thing, or about whether something is true of it."""
    return _exchange(*language.pick(rng, knowledge.fact_questions(language.pick(rng, knowledge.THINGS), rng)))


def list_conversation(rng: np.random.Generator, *, count_share: float = 0.0) -> Conversation:
    """Questions about a list of two to four things, each with two or more of its attributes.

    One or two things are never described completely, so no scene reserved for evaluation occurs.

    Args:
        rng: Source of things and words.
        count_share: Share of questions that ask how many there are, as opposed to how one is.
    """
    while True:
        count = int(rng.integers(2, 5))
        things = [_partial_thing(rng, most=3 if count == 2 else 4) for _ in range(count)]
        told = language.sentence("{text}", rng, text=" and ".join(language.object_phrase(**thing) for thing in things))
        turns: Conversation = []
        for _ in range(3 * _LIST_QUESTIONS):
            ask = _list_count if rng.random() < count_share else _list_question
            found = ask(things, rng)
            if found is not None:
                question, answer = found
                turns += _exchange(question if turns else _lines(told, question), answer)
            if len(turns) == 2 * _LIST_QUESTIONS:
                return turns
        if turns:
            return turns


def _list_question(things: list[dict[str, str]], rng: np.random.Generator) -> tuple[str, str] | None:
    """A question about an attribute of one of the things; None if its words fit another thing as well."""
    thing = language.pick(rng, things)
    asked = language.pick(rng, list(thing))
    others = [name for name in thing if name != asked]
    named = {name: thing[name] for name in rng.permutation(others)[: rng.integers(1, len(others) + 1)]}
    if sum(named.items() <= other.items() for other in things) > 1:
        return None
    words = {
        "object": "the " + language.object_phrase(**named).split(" ", 1)[1],
        "colour": language.pick(rng, language.COLOUR_WORDS),
    }
    return language.sentence(language.ATTRIBUTE_QUESTIONS[asked], rng, **words), thing[asked]


def _list_count(things: list[dict[str, str]], rng: np.random.Generator) -> tuple[str, str] | None:
    """How many things have a colour or a shape; None for more than there is a word for."""
    name, values = language.pick(rng, (("color", COLORS), ("shape", SHAPES)))
    told = [thing[name] for thing in things if name in thing]
    value = language.pick(rng, told if told and rng.random() < _COUNT_WHAT_IS_THERE else values)
    count = told.count(value)
    if count >= len(language.NUMBERS):
        return None
    counted = f"{value} objects" if name == "color" else language.PLURALS[value]
    return language.sentence(language.COUNT_QUESTION, rng, things=counted), language.NUMBERS[count]


def _partial_thing(rng: np.random.Generator, *, most: int) -> dict[str, str]:
    """Two to `most` attributes of a thing, by name."""
    names = rng.permutation(list(_ATTRIBUTES))[: rng.integers(2, most + 1)]
    return {str(name): language.pick(rng, _ATTRIBUTES[str(name)]) for name in names}


def evaluation_tasks(rng: np.random.Generator, scenes: int) -> list[TextTask]:
    """Questions about reserved scenes, and requests to imagine reserved scenes of one object.

    Args:
        rng: Source of scenes and words.
        scenes: Number of scenes that are asked about, half of them with two objects.
    """
    tasks = []
    for index in range(scenes):
        scene = sample_scene(rng, num_objects=1 + index % 2, reserved=True)
        tasks += [
            TextTask(kind, _lines(_described(scene, rng), question), answer, True, len(scene.objects))
            for kind, question, answer in language.questions(scene, rng)
        ]
    for kind in ("edit", "next_frame", "drawing", "knowledge"):
        found = 0
        while found < scenes // 4:
            request, involved = _imagined(kind, rng)
            # Two objects may be described in either order, so only one object has one right description. Prompts
            # with facts are new because of their words: too few scenes fit them to reserve some.
            if len(involved[-1].objects) == 1 and (kind == "knowledge" or is_reserved(involved[-1])):
                tasks.append(TextTask(kind, request, _plain_caption(involved[-1], rng), False))
                found += 1
    return tasks


def fact_tasks(seed: int = 0, repeats: int = 6) -> list[TextTask]:
    """Every fact asked for in every way, several times in different words."""
    rng = np.random.default_rng(seed)
    exchanges = {
        exchange
        for thing in knowledge.THINGS
        for _ in range(repeats)
        for exchange in knowledge.fact_questions(thing, rng)
    }
    return [TextTask("facts", request, answer, False) for request, answer in sorted(exchanges)]


def _described(scene: Scene, rng: np.random.Generator) -> str:
    return language.sentence("{text}", rng, text=language.caption(scene, rng))


def _plain_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A description in the one form that answers to drawing requests have."""
    scene_words = language.scene_phrase(scene, rng)
    return language.CAPTIONS[0].format(scene=scene_words, background=scene.background)


def _caption_request(rng: np.random.Generator) -> str:
    return language.sentence(language.pick(rng, language.CAPTION_REQUESTS), rng)


def _question_conversation(scene: Scene, rng: np.random.Generator) -> Conversation:
    asked = language.questions(scene, rng)
    count = int(rng.integers(1, _MAX_QUESTIONS + 1))
    turns: Conversation = []
    for index in rng.permutation(len(asked))[:count]:
        _, question, answer = asked[index]
        turns += _exchange(question if turns else _lines(_described(scene, rng), question), answer)
    return turns


def _imagined(task: str, rng: np.random.Generator) -> tuple[str, tuple[Scene, ...]]:
    """A request to describe an image that nobody has described yet.

    Returns:
        The request, and the scenes that it involves; the last is the one to describe.
    """
    if task == "drawing":
        scene = sample_scene(rng, pair_fraction=_PAIR_FRACTION, reserved=None)
        return _lines(language.drawing_prompt(scene, rng), _caption_request(rng)), (scene,)
    if task == "knowledge":
        drawn = bool(rng.random() < 0.5)
        prompt, scene, _ = knowledge.knowledge_prompt(rng, drawn=drawn, allow_held_out=True)
        return _lines(prompt, _caption_request(rng)), (scene,)
    if task == "next_frame":
        first, second, third = changes.next_frame(sample_scene(rng, num_objects=1, reserved=None), rng)
        prompt = language.sentence(language.pick(rng, changes.NEXT_FRAME_PROMPTS), rng)
        seen = (_described(first, rng), _described(second, rng))
        return _lines(*seen, prompt, _caption_request(rng)), (first, second, third)
    scene = sample_scene(rng, pair_fraction=_PAIR_FRACTION, reserved=None)
    _, instruction, changed = changes.edit(scene, rng)
    return _lines(_described(scene, rng), instruction, _caption_request(rng)), (scene, changed)


def _lines(*parts: str) -> str:
    return "\n".join(parts)


def _exchange(request: str, answer: str) -> Conversation:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
