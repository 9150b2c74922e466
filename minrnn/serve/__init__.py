"""A server of many streams: engine.py batches them, worker.py runs it, app.py speaks HTTP."""
