"""Behind the wall: the OpenAI API, served on this machine by llama.cpp. Nothing here knows of chapters or shops."""
