"""litellm: text, reasoning and a call."""

import os

import litellm

options = {"model": "openai/gpt-oss", "api_base": os.environ["BASE_URL"], "api_key": "none"}
tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
message = litellm.completion(messages=[{"role": "user", "content": "say blue"}], **options).choices[0].message
print(message.content, "|", message.reasoning_content)
streamed = litellm.completion(messages=[{"role": "user", "content": "say blue"}], stream=True, **options)
print("".join(chunk.choices[0].delta.content or "" for chunk in streamed))
called = litellm.completion(messages=[{"role": "user", "content": "weather?"}], tools=tools, **options)
print(called.choices[0].message.tool_calls[0].function.arguments)
