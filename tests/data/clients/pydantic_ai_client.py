"""pydantic-ai, through both protocols: text, thinking and a loop of tools."""

import os

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key="none")
for kind in (OpenAIChatModel, OpenAIResponsesModel):
    agent = Agent(kind("gpt-oss", provider=provider))
    called = []

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        called.append(city)
        return "warm"

    print(agent.run_sync("say blue").output)
    thoughts = [p.part_kind for m in agent.run_sync("say blue").all_messages() for p in m.parts]
    print(agent.run_sync("weather?").output, called, "thinking" in thoughts)
