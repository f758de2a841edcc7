"""Behind the wall: the OpenAI API, served on this machine by llama.cpp. It knows no chapters and no shops."""
