"""An endpoint like OpenAI's for one machine and few users: `python -m serve --model FOLDER`.

__main__   the app and its command line
api        requests and answers in OpenAI's format, without a web framework
engine     one model, a queue, and caches that outlive a turn
"""
