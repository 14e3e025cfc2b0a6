"""What Alembic runs: the connection comes from `mint_engine.store.migrate`, inside its transaction."""

from __future__ import annotations

from alembic import context

from mint_engine.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
