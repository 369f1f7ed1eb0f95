// The AI SDK: text, reasoning and a call, by both protocols.
import { createOpenAI } from '@ai-sdk/openai'
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { generateText, jsonSchema, streamText, tool } from 'ai'

const options = { name: 'quantkit', baseURL: process.env.BASE_URL, apiKey: 'none' }
const schema = { type: 'object', properties: { city: { type: 'string' } } }
const tools = { weather: tool({ description: 'The weather.', inputSchema: jsonSchema(schema) }) }
for (const model of [createOpenAICompatible(options)('gpt-oss'), createOpenAI(options).responses('gpt-oss')]) {
  const said = await generateText({ model, prompt: 'say blue' })
  console.log(said.text, '|', said.reasoningText)
  let text = ''
  for await (const piece of streamText({ model, prompt: 'say blue' }).textStream) text += piece
  console.log(text)
  const called = await generateText({ model, prompt: 'weather?', tools })
  console.log(JSON.stringify(called.toolCalls[0].input))
}
