"""Real PostgreSQL and Centrifugo servers for the demo, the tests and development, nothing to install."""
