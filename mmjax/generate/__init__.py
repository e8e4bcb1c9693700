"""Answers: sampling, chat, and what is kept between turns."""
