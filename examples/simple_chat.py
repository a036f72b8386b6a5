"""The model card's first example: a question in text, and the reasoning as well as the answer."""

import openai


def simple_chat(client: openai.OpenAI, model_name: str) -> str:
    messages = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which one is bigger, 9.11 or 9.9? Think carefully."}],
        },
    ]
    response = client.chat.completions.create(
        model=model_name, messages=messages, stream=False, max_tokens=4096
    )
    print("===== Below is reasoning =====")
    print(response.choices[0].message.reasoning)
    print("===== Below is the response =====")
    print(response.choices[0].message.content)
    return response.choices[0].message.content


if __name__ == "__main__":
    from endpoint import connect

    simple_chat(*connect())
