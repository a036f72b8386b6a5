"""Where the examples find the endpoint: OPENAI_BASE_URL and OPENAI_API_KEY, or a server of this machine.

python -m serve --model kimi-tiny        in another terminal, from the repository's root
"""

import os

import openai


def connect() -> tuple[openai.OpenAI, str]:
    """A client, and the name of the first model that its server has."""
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    return client, client.models.list().data[0].id
