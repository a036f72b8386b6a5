"""The model card's four examples without a server: the processor, `generate`, and the parsed answer.

python examples/with_transformers.py [FOLDER]
"""

import sys
from pathlib import Path
from typing import Any

from pictures import clip_mp4, draw_picture
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

SYSTEM = {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."}


def load(folder: str | Path) -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    return model, processor


def ask(model: Any, processor: Any, messages: list[dict[str, Any]], max_new_tokens: int = 4096) -> str:
    inputs = processor.apply_chat_template(messages, return_dict=True).to(model.device)
    # generation_config.json says how to sample; transformers' own default of the 50 likeliest is not the model's.
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, top_k=0)
    message = processor.tokenizer.parse_completion(output[0, inputs["input_ids"].shape[1] :])
    print("===== Below is reasoning =====")
    print(message["reasoning_content"])
    print("===== Below is the response =====")
    print(message["content"])
    return message["content"]


def simple_chat(model: Any, processor: Any, **options: Any) -> str:
    question = {"role": "user", "content": "Which one is bigger, 9.11 or 9.9? Think carefully."}
    return ask(model, processor, [SYSTEM, question], **options)


def chat_with_image(model: Any, processor: Any, **options: Any) -> str:
    content = [
        {"type": "text", "text": "Describe this image in detail."},
        {"type": "image", "image": draw_picture()},
    ]
    return ask(model, processor, [{"role": "user", "content": content}], **options)


def chat_with_video(model: Any, processor: Any, **options: Any) -> str:
    content = [
        {"type": "text", "text": "Describe this video in detail."},
        {"type": "video", "video": clip_mp4()},
    ]
    return ask(model, processor, [{"role": "user", "content": content}], **options)


def chat_with_preserve_thinking(model: Any, processor: Any, **options: Any) -> str:
    thought = (
        "I'll start by listing five numbers: 473, 921, 235, 215, 222, and I'll tell you the first three."
    )
    messages = [
        {"role": "user", "content": "Tell me three random numbers."},
        {"role": "assistant", "reasoning_content": thought, "content": "473, 921, 235"},
        {"role": "user", "content": "What are the other two numbers you have in mind?"},
    ]
    return ask(model, processor, messages, **options)


EXAMPLES = (simple_chat, chat_with_image, chat_with_video, chat_with_preserve_thinking)

if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "kimi-tiny"
    parts = load(sys.argv[1] if len(sys.argv) > 1 else default)
    set_seed(0)
    for example in EXAMPLES:
        print(f"\n{example.__name__}")
        example(*parts)
