"""Wordings of prompts and answers, one of which is picked for each record.

Names in braces are filled in; `{image}`, `{images}` and `{frames}` become image markers.
"""

DRAW = (
    "Generate an image: {caption}",
    "Draw a picture of this. {caption}",
    "Create an image that fits this description: {caption}",
    "{caption}\nShow me this as an image.",
    "I need a picture for the following text. {caption}",
    "Paint what is described here: {caption}",
)
DRAWN = ("{image}", "Here is the image. {image}", "Here it is: {image}", "This is how it looks: {image}")

EDIT = (
    "{image}\n{instruction}",
    "{instruction}\n{image}",
    "Change this image as follows. {instruction}\n{image}",
    "{image}\nEdit the image: {instruction}",
    "Here is an image. {image}\nPlease do this to it: {instruction}",
)
EDITED = ("{image}", "Here is the edited image. {image}", "Done: {image}", "This is the result: {image}")

LOOK_CLOSER = (
    "First show the part of the image that matters, then answer.",
    "Zoom in on what the answer depends on before you give it.",
    "Look closer at the relevant part, and answer after that.",
)
LOOKED_CLOSER = ("{images}\n{answer}", "A closer look: {images}\n{answer}", "This part matters: {images}\n{answer}")

MARK = (
    "First mark what you have to look at, then answer.",
    "Show where the objects in question are before you answer.",
    "Find and mark the objects that matter, and answer after that.",
)
MARKED = ("{image}\n{answer}", "The objects are marked here: {image}\n{answer}", "They are here: {image}\n{answer}")

SHOWN_IN_VIDEO = ("The video shows this: {caption}\n", "{caption}\n")

FORWARD = (
    "{frames}\nA video begins with this frame. Draw how it goes on: {count}.",
    "This is the first frame of a video: {frames}\nHow does it go on? Show {count} more.",
)
SPLIT = (
    "{frames}\nHere is the first part of a video. Draw the rest of it: {count}.",
    "A video begins like this: {frames}\nContinue it to its end with {count} more.",
)
BACKWARD = (
    "{frames}\nA video ends with this frame. Go back in time from here and draw {count}.",
    "This is the last frame of a video: {frames}\nStep back frame by frame and show {count} of what came before.",
)
ALTERNATE_FIRST = (
    "{frames}\nLet us continue a video in turns. This frame is mine; draw the next one.",
    "We take turns to draw the frames of a video. I begin: {frames}\nWhat comes next?",
)
ALTERNATE = ("{frames}\nAnd after this one?", "Then comes this frame. {frames}\nDraw the next.")
REORDER = (
    "{frames}\nThese frames of a video are out of order. Draw them in the order in which they happened.",
    "Somebody shuffled these {count} of a video: {frames}\nShow them in their right order.",
)
INTERVAL = (
    "{frames}\nThis is a frame of a video. Draw what is to be seen {seconds} seconds later.",
    "How does this look {seconds} seconds later? {frames}",
)
NEXT_K = (
    "{frames}\nDraw exactly {count} of what follows in this video.",
    "This is how a video begins: {frames}\nWhat follows at once? Show {count}.",
)
