"""The generation engine, the OpenAI-compatible server and the browser page."""
