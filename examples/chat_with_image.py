"""The model card's second example: a picture as a data URI, and a question about it."""

import base64

import openai
from pictures import picture_png


def chat_with_image(client: openai.OpenAI, model_name: str) -> str:
    image_base64 = base64.b64encode(picture_png()).decode()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe this image in detail."},
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/png;base64,{image_base64}"},
                },
            ],
        }
    ]
    response = client.chat.completions.create(
        model=model_name, messages=messages, stream=False, max_tokens=8192
    )
    print("===== Below is reasoning =====")
    print(response.choices[0].message.reasoning)
    print("===== Below is the response =====")
    print(response.choices[0].message.content)
    return response.choices[0].message.content


if __name__ == "__main__":
    from endpoint import connect

    chat_with_image(*connect())
