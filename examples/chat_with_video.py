"""The model card's third example: a video as a data URI, and a question about it."""

import base64

import openai
from pictures import clip_mp4


def chat_with_video(client: openai.OpenAI, model_name: str) -> str:
    video_base64 = base64.b64encode(clip_mp4()).decode()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Describe this video in detail."},
                {
                    "type": "video_url",
                    "video_url": {"url": f"data:video/mp4;base64,{video_base64}"},
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

    chat_with_video(*connect())
