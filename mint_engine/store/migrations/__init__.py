"""Alembic migrations. They run by themselves when a store is opened; `schema.py` says how to add one."""
