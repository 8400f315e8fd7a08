"""Real servers for the demo, the tests and local development: PostgreSQL and Centrifugo without installing either."""
