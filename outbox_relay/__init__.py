"""Transactional outbox relay for PostgreSQL and Centrifugo."""
