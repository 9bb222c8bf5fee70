"""Six prompts of different domains. They are openings: the small reference model never learned to answer questions."""

PROMPTS = (
    ("python", 'def merge_sorted(left, right):\n    """Merge two sorted lists."""\n    result = []\n'),
    ("law", "§ 7-201. Definitions.\nFor the purposes of this chapter, the term “Department” means the Department of"),
    ("verse", "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n"),
    ("sql", "-- Which team has more than 20 points?\nSELECT TEAM FROM table WHERE POINTS > 20 ;\n\n-- "),
    ("medicine", "Aspirin after surgery: a randomized trial\nBackground: We compared the effect of daily aspirin with"),
    ("rust", "impl<T> Stack<T> {\n    pub fn push(&mut self, value: T) {\n        self."),
)
