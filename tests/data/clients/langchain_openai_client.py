"""langchain: text, reasoning, and a call, whole and streamed."""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "warm"


for responses in (False, True):
    model = ChatOpenAI(model="gpt-oss", base_url=os.environ["BASE_URL"], api_key="none", use_responses_api=responses)
    print(model.invoke("say blue").text)
    print("".join(chunk.text for chunk in model.stream("say blue")))
    print(model.bind_tools([weather]).invoke("weather?").tool_calls[0]["args"])
