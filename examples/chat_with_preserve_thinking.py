"""The model card's fourth example: what the model thought in an earlier turn is still there in a later one."""

import openai


def chat_with_preserve_thinking(client: openai.OpenAI, model_name: str) -> str:
    messages = [
        {"role": "user", "content": "Tell me three random numbers."},
        {
            "role": "assistant",
            "reasoning_content": "I'll start by listing five numbers: 473, 921, 235, 215, 222, and I'll tell you the"
            " first three.",
            "content": "473, 921, 235",
        },
        {"role": "user", "content": "What are the other two numbers you have in mind?"},
    ]
    response = client.chat.completions.create(
        model=model_name, messages=messages, stream=False, max_tokens=4096
    )
    # The answer should be 215 and 222, which are in the reasoning only.
    print("===== Below is reasoning =====")
    print(response.choices[0].message.reasoning)
    print("===== Below is the response =====")
    print(response.choices[0].message.content)
    return response.choices[0].message.content


if __name__ == "__main__":
    from endpoint import connect

    chat_with_preserve_thinking(*connect())
