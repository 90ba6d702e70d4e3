"""Policies over a websocket: server, light client, chunk broker, real-time chunking."""
