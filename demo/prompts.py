"""Six prompts of different domains. They are openings; the small reference model only ever learned to go on."""

PROMPTS = (
    ("python", 'def merge_sorted(left, right):\n    """Merge two sorted lists."""\n    result = []\n'),
    ("law", "§ 7-201. Definitions.\nFor the purposes of this chapter, the term “Department” means the Department of"),
    ("verse", "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date:\n"),
    ("sql", "Question: Which players scored more than 20 points?\nSELECT"),
    ("medicine", "BACKGROUND: We compared the effect of daily aspirin with placebo in patients with"),
    ("rust", "impl<T> Stack<T> {\n    pub fn push(&mut self, value: T) {\n"),
)
