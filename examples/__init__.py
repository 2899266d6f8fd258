"""Programs that use fla as any other program would: a language model, a recall task, the demo."""
