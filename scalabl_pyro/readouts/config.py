"""The settings of readouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import PROMPTS, Prompt, Record, read_template

__all__ = ["NORMALISE", "TEMPERATURE", "ReadoutConfig"]

#: what log p is divided by; or that log p without the prompt is taken away
NORMALISE = ("characters", "tokens", "none", "unconditional")
#: whether κ is trained, or 1
TEMPERATURE = ("trained", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadoutConfig:
    """How records are put to a language model, and how its answer is read.

    A setting that the chosen readout does not use is refused where it is not left out.

    :param prompt: for label tokens and choice likelihood, a name in ``PROMPTS``; ``auto`` is the
        readout's own, which :class:`~scalabl_pyro.lora.ModelConfig` fills in.
    :param template: a text of your own instead of the prompt's, or a file that holds it, with
        ``{question}`` and maybe ``{choices}`` where these go (see
        :class:`~scalabl_pyro.data.Prompt`). The text is kept, not the name of its file.
    :param shots: how many records of the training split are shown with their answers before each
        question.
    :param system: a message that stands before all others in the chat template.
    :param chat: for causal language models, put prompts through the chat template.
    :param normalise: for choice likelihood, what log p of a choice is divided by: its
        ``characters``, its ``tokens``, or ``none``; ``unconditional`` takes away log p of the
        choice without the prompt.
    :param temperature: for choice likelihood, whether κ is ``trained``, or 1 with ``none`` (see
        :class:`~scalabl_pyro.readouts.ChoiceLikelihood`).
    :param truncate: cut the questions of prompts that are longer than the context instead of
        refusing them.
    :raises ValueError: if a value is not one of those listed, or a text cannot be what it is for.
    """

    prompt: str = "auto"
    template: str | None = None
    shots: int = 0
    system: str | None = None
    chat: bool = False
    normalise: str = "characters"
    temperature: str = "trained"
    truncate: bool = False

    def __post_init__(self) -> None:
        allowed: dict[str, list[Any]] = {
            "prompt": ["auto", *sorted(PROMPTS)],
            "normalise": list(NORMALISE),
            "temperature": list(TEMPERATURE),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {values}")
        if self.shots < 0:
            raise ValueError(f"shots is {self.shots}: expected 0 or more")
        if self.template is not None:
            object.__setattr__(self, "template", read_template(self.template))
        for name in ("template", "system"):
            if "${" in (getattr(self, name) or ""):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: expected a text without '${{', which means"
                    " another setting in a run's config.yaml"
                )
        if self.prompt != "auto":
            self.make_prompt(())
        if self.system is not None and not self.chat:
            raise ValueError(
                f"system is {self.system!r}, but chat is false: a system message is part of a chat"
                " template; set chat=true, or write it into the template"
            )

    def make_prompt(self, shots: Sequence[Record]) -> Prompt:
        """What these settings put records by.

        :param shots: as many labelled records as the setting says.
        """
        prompt = PROMPTS[self.prompt]
        template = prompt.template if self.template is None else self.template
        return replace(prompt, template=template, system=self.system, shots=tuple(shots))
