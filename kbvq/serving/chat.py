"""A conversation with a packed checkpoint, on the terminal or in a pipe: `kbvq chat`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from transformers import TextStreamer

from kbvq.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatOptions:
    """max_new_tokens: of one answer. temperature: 0 takes the likeliest token always."""

    max_new_tokens: int = 256
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: at least 1")
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: at least 0, which takes the likeliest token always")


class Chat:
    """Answers written to `output` as they are generated.

    With a chat template the model sees the whole conversation; without one each text is continued on its own.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ChatOptions, output: TextIO
    ) -> None:
        self.model, self.tokenizer, self.options, self.output = model, tokenizer, options, output
        self.has_template = tokenizer.chat_template is not None
        self._messages: list[dict[str, str]] = []

    def answer(self, text: str) -> str:
        """Write what the model says to a text, and return it without the text.

        Raises ConfigError when the model takes no so long conversation; what was said before stays.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        inputs = self._inputs(messages, text)
        prompt_length = inputs["input_ids"].shape[1]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.options.max_new_tokens if longest is None else longest - prompt_length
        if room < 1:
            raise ConfigError(
                f"the conversation has {prompt_length} tokens and the model takes {longest}; begin a new one"
            )
        sampling = (
            {"do_sample": True, "temperature": self.options.temperature}
            if self.options.temperature
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        tokens = self.model.generate(
            **inputs,
            max_new_tokens=min(self.options.max_new_tokens, room),
            streamer=_Streamer(self.tokenizer, self.output),
            pad_token_id=self.model.generation_config.pad_token_id or self.tokenizer.pad_token_id or 0,
            **sampling,
        )
        said = self.tokenizer.decode(tokens[0, prompt_length:], skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": said}]
        return said

    def answer_all(self, texts: Iterable[str]) -> None:
        """Answer one after the other; empty ones are passed over."""
        for text in texts:
            if text.strip():
                self.answer(text.strip())

    def _inputs(self, messages: list[dict[str, str]], text: str) -> Mapping[str, Tensor]:
        if self.has_template:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer(text, return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class _Streamer(TextStreamer):
    """Writes whole words as they come, to any stream."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.output = output

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.output.write(text + ("\n" if stream_end else ""))
        self.output.flush()


def typed_lines(prompt: str = "> ") -> Iterable[str]:
    """What a person types, line by line, until the end of the input or the line "/exit"."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return
        if line.strip() == "/exit":
            return
        yield line
