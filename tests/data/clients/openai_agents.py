"""openai-agents, through both protocols: a tool is called, and its result used."""

import asyncio
import os

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
called = []


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    called.append(city)
    return "warm"


async def main():
    client = AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="none")
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="gpt-oss", openai_client=client)
        agent = Agent(name="a", instructions="Help.", model=model, tools=[weather])
        result = await Runner.run(agent, "weather?")
        print(result.final_output, called)


asyncio.run(main())
