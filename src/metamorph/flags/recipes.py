"""A YAML recipe and command-line flags as dataclasses: flags override the recipe, and nothing unknown passes."""

from argparse import SUPPRESS, Action, ArgumentError, ArgumentTypeError
from collections.abc import Iterable, Sequence
from inspect import signature
from itertools import groupby
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from metamorph.files.yaml_files import read_yaml
from metamorph.flags.checks import attribute_docs
from metamorph.flags.parser import FlagParser, finite_number, nearest, with_default
from metamorph.recipes import config_flag, find_recipe


_INHERITED, _REFUSED = "flags of transformers.TrainingArguments", "flags that are not supported here"


class RecipeParser(FlagParser, HfArgumentParser):
    """Parser of flags that are fields of dataclasses, with defaults from a YAML recipe."""

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, usage="%(prog)s [--config RECIPE] [--flag value …]", **kwargs)
        help_text = "YAML file of flags, or a recipe listed by `metamorph recipes`; other flags override it"
        self.add_argument("--config", metavar="RECIPE", help=help_text)
        docs = {kind: attribute_docs(kind) for kind in self.dataclass_types}
        # `float | str` is a number or `auto`, which HfArgumentParser takes for a number only.
        number_or_auto = {name for kind in docs for name, hint in get_type_hints(kind).items() if hint == float | str}
        titles = {"help": "options", "config": "options"}
        titles |= {name: kind.__name__ for kind in docs for name in docs[kind]}
        self._titles = titles | {name: _INHERITED for name in self.actions if name not in titles}
        texts = {name: text for kind in docs for name, text in docs[kind].items()}
        for name, (accepted, reason) in (item for kind in docs for item in kind.unsupported.items()):
            if not any(accepted[1:]):  # else some values have an effect
                texts[name] = f"Not supported: {reason}."
                self._titles.pop(name, None)
                self._titles[name] = _REFUSED  # the last section
        for action in self._actions:
            # Help and errors show the spelling with underscores; both are accepted.
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]
            if action.const is False:
                action.help = f"Same as --{action.dest} False."
            elif action.dest in texts:
                action.help = with_default(texts[action.dest].replace("%", "%%"), action)
            if action.dest in number_or_auto:
                action.type = _number_or_auto
            # Defaults come from the dataclasses, so that the parsed values are only those given.
            action.default = SUPPRESS

    def format_help(self) -> str:
        """Our flags first, by dataclass, in the order of their definition; refused ones last."""
        order = list(self._titles)
        actions = sorted(self._actions, key=lambda action: order.index(action.dest))
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, (), ())
        for title, section in groupby(actions, lambda action: self._titles[action.dest]):
            formatter.start_section(title)
            formatter.add_arguments(section)
            formatter.end_section()
        return formatter.format_help()

    @property
    def actions(self) -> dict[str, Action]:
        """The flags by field name, without negations such as `--no_bf16`."""
        return {action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")}

    def set_recipe(self, path: str) -> None:
        """Make the values of a YAML file the defaults of the flags."""
        actions = self.actions
        for name, value in read_recipe(path).items():
            if name not in actions:
                near = nearest(name, actions)
                hint = f"did you mean {near!r}?" if near else f"see {self.prog} --help"
                raise ValueError(f"unknown flag {name!r} in {path}: {hint}")
            actions[name].required = False
            self.set_defaults(**{name: self._coerce(value, actions[name], source=path)})

    def _coerce(self, value: Any, action: Action, source: str) -> Any:
        """Convert a YAML value to the type of a flag: YAML reads `1e-4` as a string and `5` as an integer."""
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list):
            if action.nargs != "+":
                raise ValueError(f"{action.dest} in {source} takes one value, not a list: {value}")
            return [self._coerce(item, action, source) for item in value]
        try:
            converted = self._get_value(action, str(value))
            self._check_value(action, converted)
        except ArgumentError as error:
            raise ValueError(f"{action.dest}: {value!r} in {source} is not a valid value: {error.message}") from error
        return converted


def parse_arguments(
    dataclass_types: Sequence[type], argv: Sequence[str], *, prog: str = "metamorph train"
) -> tuple[Any, ...]:
    """Build one instance of each dataclass from `--config recipe.yaml --flag value …`.

    A dataclass that has a flag of another one as an `InitVar` gets its value. Unknown flags and keys, and values of the
    wrong type, are a `ValueError`.
    """
    parser = RecipeParser(dataclass_types, prog=prog)
    recipe = config_flag(argv)
    if recipe is not None:
        parser.set_recipe(recipe)
    namespace, remaining = parser.parse_known_args(list(argv))
    if remaining:
        raise ValueError(f"unexpected arguments: {' '.join(remaining)}")
    given = vars(namespace)
    return tuple(
        kind(**{name: given[name] for name in signature(kind.__init__).parameters if name in given})  # type: ignore[misc]
        for kind in dataclass_types
    )


def read_recipe(path: str) -> dict[str, Any]:
    """Flag names and values of the YAML file at `path`, or of the shipped recipe of that name."""
    file = find_recipe(path)
    try:
        values = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"--config {path} cannot be read as a recipe: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold one mapping `flag: value`, not {type(values).__name__}")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in values.items()}


def _number_or_auto(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return finite_number(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text!r} is neither a finite number nor auto") from error
