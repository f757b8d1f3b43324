"""The token loop: step(), forward(), generate(), and the published ways of answering."""
