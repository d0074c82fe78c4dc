# SPDX-License-Identifier: Apache-2.0
"""Train a small reference model that reads images on coloured squares and write it as a checkpoint.

    python -m model.checkpoint OUT --multimodal [--train-seconds 120] [--seed 0] [--attn-implementation sdpa]

OUT becomes a directory that `AutoModelForImageTextToText.from_pretrained(OUT, trust_remote_code=True)` and
`AutoProcessor.from_pretrained(OUT, trust_remote_code=True)` load anywhere.
"""

import random
from pathlib import Path

import torch
from tokenizers import processors
from transformers import BatchFeature, GenerationConfig

from . import squares
from .configuration_multimodal import ReferenceMultimodalConfig
from .image_processing_reference import ReferenceImageProcessor
from .modeling_multimodal import ReferenceForConditionalGeneration
from .processing_reference import (
    FRAME,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION_TOKENS,
    ReferenceProcessor,
)
from .training import prepare, train_on, train_tokenizer

# Examples of one kind make a batch, so that little of it is padding.
BATCH_SIZES = {"one": 32, "several": 12, "video": 12, "none": 8}
ONE_IMAGE_SHARE = 0.25  # of the training, before there are several images: what is learned then serves those too
LEARNING_RATE = 3e-3  # at three times this, places of squares are never learned
VOCAB_SIZE = 384  # all 256 bytes, the special tokens, and the few words there are

# An answer begins a line: after a space its first token would be another one, with the space inside.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message["role"] + "\\n" -}}
{%- if message["content"] is string -%}
{{- message["content"] -}}
{%- else -%}
{%- for part in message["content"] -%}
{%- if part["type"] == "image" -%}{{- "<|image|>" -}}
{%- elif part["type"] == "video" -%}{{- "<|video|>" -}}
{%- elif part["type"] == "text" -%}{{- part["text"] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message["role"] == "assistant" -%}{{- eos_token -}}{%- endif -%}
{{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "assistant\\n" -}}{%- endif -%}
"""


def build_processor() -> ReferenceProcessor:
    """Tokenizer, image processor and chat template. No token is put before a text: the template does that itself."""
    examples = random.Random(0)
    texts = [
        f"user\n{example.question}\nassistant\n{example.answer}"
        for example in (squares.draw_example(examples, kind=kind) for kind in ("several", "video") * 200)
    ]
    named = {
        "image_token": IMAGE,
        "video_token": VIDEO,
        "image_start_token": IMAGE_START,
        "image_end_token": IMAGE_END,
        "video_start_token": VIDEO_START,
        "frame_token": FRAME,
        "video_end_token": VIDEO_END,
    }
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, special_tokens=VISION_TOKENS, extra_special_tokens=named)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return ReferenceProcessor(ReferenceImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE)


def multimodal_config(processor: ReferenceProcessor) -> ReferenceMultimodalConfig:
    """The trained model's shape: a sliding and a full text layer, 2 vision layers."""
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ReferenceMultimodalConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            # No image is longer than the window. vLLM would show it to itself causally.
            sliding_window=64,
            initializer_range=0.05,
            **special,
        ),
        vision_config=dict(patch_size=processor.image_processor.patch_size, initializer_range=0.05),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_start_token_id=tokenizer.convert_tokens_to_ids(IMAGE_START),
        image_end_token_id=tokenizer.convert_tokens_to_ids(IMAGE_END),
        **special,
    )


def prompt_of(processor: ReferenceProcessor, example: squares.Example) -> str:
    """The text that asks the question of an example, one `<|image|>` or `<|video|>` for each image or video."""
    return processor.apply_chat_template(example.messages, add_generation_prompt=True, tokenize=False)


def batch_of(processor: ReferenceProcessor, examples: list[squares.Example], with_answers: bool) -> BatchFeature:
    """The model's inputs for some examples; with answers, `labels` that count only the answers."""
    prompts = [prompt_of(processor, example) for example in examples]
    end = processor.tokenizer.eos_token
    inputs = processor(
        text=[prompt + example.answer + end for prompt, example in zip(prompts, examples, strict=True)]
        if with_answers
        else prompts,
        images=[image for example in examples for image in example.images] or None,
        videos=[video for example in examples for video in example.videos] or None,
        padding=True,
        return_tensors="pt",
    )
    if with_answers:
        answers = [processor.tokenizer(example.answer + end)["input_ids"] for example in examples]
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        for row, answer in enumerate(answers):
            inputs["labels"][row, -len(answer) :] = inputs["input_ids"][row, -len(answer) :]
    return inputs


@torch.no_grad()
def answers_of(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, examples: list[squares.Example]
) -> list[str]:
    """What the model answers, greedily."""
    inputs = batch_of(processor, examples, with_answers=False).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy_of(
    model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, examples: list[squares.Example]
) -> float:
    """The share of examples whose answer is right to the letter."""
    answers: list[str] = []
    for first in range(0, len(examples), 32):
        answers += answers_of(model, processor, examples[first : first + 32])
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(examples)


def save(model: ReferenceForConditionalGeneration, processor: ReferenceProcessor, out: Path) -> None:
    """Write the complete checkpoint directory: configuration, weights, tokenizer, processor, all code."""
    model.config.auto_map = {
        "AutoModel": "modeling_multimodal.ReferenceMultimodalModel",
        "AutoProcessor": "processing_reference.ReferenceProcessor",
        "AutoImageProcessor": "image_processing_reference.ReferenceImageProcessor",
    }
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        # Answers are text. Drafts taken from a prompt (`prompt_lookup_num_tokens`) would have its images' tokens too.
        suppress_tokens=sorted({*processor.image_token_ids, *processor.video_token_ids}),
    )  # fmt: skip
    model.save_pretrained(out)
    processor.save_pretrained(out)


def write_multimodal_checkpoint(
    out: str | Path, train_seconds: float = 120.0, seed: int = 0, attn_implementation: str = "sdpa"
) -> ReferenceForConditionalGeneration:
    """Train a model for `train_seconds` and write it, with its processor, to the directory `out`.

    Arguments, errors and what repeats are as in `model.checkpoint.write_checkpoint`. Prints how many questions about
    pairs of colour and place that no training example showed are answered right to the letter.
    """
    out = prepare(out, ReferenceMultimodalConfig.model_type, train_seconds, seed, attn_implementation)
    generator = random.Random(seed)
    processor = build_processor()
    model = ReferenceForConditionalGeneration(multimodal_config(processor))
    model.set_attn_implementation(attn_implementation)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"images of coloured squares, {parameters:,} parameters, {model.device}", flush=True)

    def draw(elapsed: float) -> BatchFeature:
        weights = [12, 0, 0, 1] if elapsed < ONE_IMAGE_SHARE else [3, 10, 6, 1]
        kind = generator.choices(list(BATCH_SIZES), weights)[0]
        examples = [squares.draw_example(generator, kind=kind) for _ in range(BATCH_SIZES[kind])]
        return batch_of(processor, examples, with_answers=True)

    train_on(model, draw, train_seconds, LEARNING_RATE, LEARNING_RATE)
    save(model, processor, out)
    held_out = random.Random(seed + 1)
    for kind in ("one", "several", "video", "none"):
        examples = [squares.draw_example(held_out, held_out=True, kind=kind) for _ in range(64)]
        print(f"right answers, held out, {kind}: {accuracy_of(model, processor, examples):.0%}")
    print("\n--- to load it ---")
    print(f'AutoModelForImageTextToText.from_pretrained("{out.resolve()}", trust_remote_code=True)')
    print(f'AutoProcessor.from_pretrained("{out.resolve()}", trust_remote_code=True)')
    return model
