"""Hand-written wording of the pocket corpus: paraphrased templates and word lists.

Each task has three disjoint sets of prompt templates (``pool``, ``dev``, ``query``) and a set
of declarative sentences (``text``) for the pretraining documents. ``{slot}`` is filled from the
fact, ``{a}`` (only in ``text``) is the fact's answer, and ``[one|other]`` picks by the fact's
variant (for instance larger or smaller). Query templates avoid the words that name the task in
its pool templates, so that matching words alone does not find the task.
"""

from __future__ import annotations

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "capital": {
        "pool": (
            "What is the capital of {x}?",
            "Name the capital city of {x}.",
            "Tell me the capital of {x}.",
            "Q: Which city is the capital of {x}? A:",
            "Give the capital: {n}",
            "Answer briefly: what is the name of the capital of {x}?",
            "Fill in the blank: the capital of {x} is ___.",
            "I am writing about {x}. Which capital should I name?",
            "capital city, {n}",
            "Complete the pair. Country: {n}. Capital:",
            "Do you know what the capital of {x} is called?",
        ),
        "dev": (
            "Which town is the seat of state in {x}?",
            "Write down the chief political centre of {x}.",
            "{n}: seat of state",
            "Find the political centre of {x}.",
        ),
        "query": (
            "Which place is marked with a star on a map of {x}?",
            "Answer briefly: from where is {x} governed?",
            "Tell me where an ambassador to {x} would work.",
            "Where does the government of {x} sit?",
        ),
        "text": (
            "{a} is the capital of {x}.",
            "The seat of government in {x} is {a}.",
            "{x} has its capital at {a}.",
            "The capital city of {x} goes by the name of {a}.",
            "{a} serves {x} as its capital.",
        ),
    },
    "currency": {
        "pool": (
            "What is the currency of {x}?",
            "Name the currency used in {x}.",
            "Tell me which currency {x} uses.",
            "Q: What currency do people use in {x}? A:",
            "Give the currency: {n}",
            "Answer briefly: which currency is official in {x}?",
            "Fill in the blank: the currency of {x} is the ___.",
            "I am writing about {x}. Which currency should I name?",
            "currency, {n}",
            "Complete the pair. Country: {n}. Currency:",
            "Do you know what the currency of {x} is called?",
        ),
        "dev": (
            "What kind of money circulates in {x}?",
            "Name the legal tender of {x}.",
            "{n}: unit of money",
            "Write down the money of {x}.",
        ),
        "query": (
            "What do shoppers in {x} pay with?",
            "Tell me what a cash machine in {x} hands out.",
            "Answer briefly: wages in {x} are paid in what?",
            "In which unit is a price tag in {x} written?",
        ),
        "text": (
            "{x} uses the {a}.",
            "The currency of {x} is the {a}.",
            "People in {x} pay with the {a}.",
            "In {x} prices are given in the local money, the {a}.",
            "The {a} is legal tender in {x}.",
        ),
    },
    "continent": {
        "pool": (
            "On which continent is {x}?",
            "Name the continent of {x}.",
            "Tell me the continent where {x} lies.",
            "Q: Which continent does {x} belong to? A:",
            "Give the continent: {n}",
            "Answer briefly: what continent is {x} on?",
            "Fill in the blank: {x} is on the continent of ___.",
            "I am writing about {x}. Which continent should I name?",
            "continent, {n}",
            "Complete the pair. Country: {n}. Continent:",
            "Which of the continents includes {x}?",
        ),
        "dev": (
            "What part of the world is {x} in?",
            "Write down the world region of {x}.",
            "{n}: world region",
            "Name the world region that holds {x}.",
        ),
        "query": (
            "In which chapter of an atlas would you look for {x}?",
            "Tell me roughly where on the globe {x} lies.",
            "Answer briefly: a plane lands in {x}; what broad stretch of the Earth is that?",
            "Which large piece of the planet is home to {x}?",
        ),
        "text": (
            "{x} lies in {a}.",
            "{x} is part of {a}.",
            "On the map, {x} is found in {a}.",
            "{x} is one of the countries of {a}.",
            "{x} belongs to the continent of {a}.",
        ),
    },
    "country_code": {
        "pool": (
            "What is the two-letter country code of {x}?",
            "Name the ISO code of {x}.",
            "Tell me the ISO two-letter code for {x}.",
            "Q: What code does ISO give {x}? A:",
            "Give the country code: {n}",
            "Answer briefly: which two-letter code means {n}?",
            "Fill in the blank: the country code of {x} is ___.",
            "I am writing about {x}. Which country code should I use?",
            "ISO code, {n}",
            "Complete the pair. Country: {n}. Code:",
            "Do you know the two-letter code of {x}?",
        ),
        "dev": (
            "How is {n} abbreviated with a pair of capitals?",
            "{n}: international abbreviation",
            "Write {n} in its two-character short form.",
            "Name the international abbreviation of {x}.",
        ),
        "query": (
            "Which pair of letters stands for {x} in a data table?",
            "Answer briefly: how would a form shorten {n}?",
            "Tell me the short symbol that a software menu shows for {x}.",
            "What do flags on a web site say when they mean {x}?",
        ),
        "text": (
            "{x} has the code {a} in the ISO list.",
            "The letters {a} stand for {x}.",
            "In international lists {x} is written {a}.",
            "{x} is shortened to {a}.",
            "The code {a} means {n}.",
        ),
    },
    "calling_code": {
        "pool": (
            "What is the calling code of {x}?",
            "Name the telephone code for {x}.",
            "Tell me the dialling code of {x}.",
            "Q: Which calling code does {x} have? A:",
            "Give the calling code: {n}",
            "Answer briefly: what is the phone code of {x}?",
            "Fill in the blank: the phone code of {x} is ___.",
            "I am writing about {x}. Which calling code should I name?",
            "calling code, {n}",
            "Complete the pair. Country: {n}. Calling code:",
            "Do you know the telephone code of {x}?",
        ),
        "dev": (
            "Which prefix do I dial to reach {x}?",
            "Name the international prefix for {x}.",
            "{n}: prefix from abroad",
            "Write the prefix to dial for {x}.",
        ),
        "query": (
            "I want to ring a friend in {x}. Which digits come first?",
            "Answer briefly: with what do international numbers in {x} start?",
            "Tell me what to press before a local number in {x} when I am overseas.",
            "How does the contact details line of a firm in {x} begin?",
        ),
        "text": (
            "Telephone numbers in {x} start with {a}.",
            "The calling code for {x} is {a}.",
            "Calls to {x} begin with {a}.",
            "{x} is reached by phone with the prefix {a}.",
            "The prefix {a} belongs to {x}.",
        ),
    },
    "official_language": {
        "pool": (
            "What is the official language of {x}?",
            "Name the official language of {x}.",
            "Tell me which language is official in {x}.",
            "Q: Which official language does {x} have? A:",
            "Give the official language: {n}",
            "Answer briefly: what language does {x} use officially?",
            "Fill in the blank: the official language of {x} is ___.",
            "I am writing about {x}. Which official language should I name?",
            "official language, {n}",
            "Complete the pair. Country: {n}. Language:",
            "Do you know the official language of {x}?",
        ),
        "dev": (
            "Which tongue does the state use in {x}?",
            "Name the tongue of public offices in {x}.",
            "{n}: state tongue",
            "Write down the tongue of the state in {x}.",
        ),
        "query": (
            "What would a civil servant in {x} speak at work?",
            "Answer briefly: in what are the laws of {x} written?",
            "Tell me what is spoken in the courts of {x}.",
            "How would a public notice in {x} be worded: in what?",
        ),
        "text": (
            "The official language of {x} is {a}.",
            "{x} has {a} for its official language.",
            "The state of {x} uses {a}.",
            "Laws in {x} are written in {a}.",
            "{a} is official in {x}.",
        ),
    },
    "country_abroad": {
        "pool": (
            "What is {x} called in {l}?",
            "Translate the country name into {l}: {n}",
            "Tell me the {l} name of {x}.",
            "Q: What is the {l} name of the country {n}? A:",
            "Give the {l} word for the country {n}.",
            "Answer briefly: {n} in {l}?",
            "Fill in the blank: in {l}, {x} is called ___.",
            "I am writing in {l}. How should I write the country {n}?",
            "{n}, {l} name",
            "Complete the pair. English: {n}. {l}:",
        ),
        "dev": (
            "What would a {l} atlas print for {x}?",
            "Put {n} into {l}, please.",
            "{n}: as said by {l} speakers",
            "Find the {l} form of {n}.",
        ),
        "query": (
            "A map is labelled in {l}. What do I read over {x}?",
            "Answer briefly: what do {l} speakers say for {x}?",
            "Render {n} for a reader of {l}.",
        ),
        "text": (
            "In {l}, {x} goes by {a}.",
            "The {l} form of the name {n} is {a}.",
            "{l} speakers say {a} for {x}.",
            "A {l} map shows {x} with the label {a}.",
            "The word {a} means {n} in {l}.",
        ),
    },
    "language_abroad": {
        "pool": (
            "What is the {n} language called in {l}?",
            "Translate the language name into {l}: {n}",
            "Tell me the {l} name of the {n} language.",
            "Q: What is the {l} name of the language {n}? A:",
            "Give the {l} word for the language {n}.",
            "Answer briefly: the language {n}, in {l}?",
            "Fill in the blank: in {l}, the {n} language is called ___.",
            "I am writing in {l}. How should I write the language {n}?",
            "{n} language, {l} name",
            "Complete the pair. Language in English: {n}. In {l}:",
        ),
        "dev": (
            "How do {l} speakers refer to the {n} tongue?",
            "Put the tongue {n} into {l}, please.",
            "{n}, a tongue: as said by {l} speakers",
            "Find the {l} form of {n} as a tongue.",
        ),
        "query": (
            "A {l} school offers lessons in {n}. What does its course list print?",
            "Answer briefly: what do {l} speakers say for {n} speech?",
            "Render the subject {n}, taught in class, for a reader of {l}.",
        ),
        "text": (
            "In {l}, the {n} language goes by {a}.",
            "The {l} form of the language name {n} is {a}.",
            "{l} speakers say {a} for the {n} language.",
            "A {l} course list shows lessons in {n} as {a}.",
            "The word {a} means {n} in {l}.",
        ),
    },
    "calendar_abroad": {
        "pool": (
            "What is {w} in {l}?",
            "Translate the calendar word into {l}: {w}",
            "Tell me the {l} word for {w}.",
            "Q: How do you say {w} in {l}? A:",
            "Give the {l} name for {w}.",
            "Answer briefly: {w} in {l}?",
            "Fill in the blank: the {l} word for {w} is ___.",
            "I am making a calendar in {l}. How should I write {w}?",
            "{w}, {l} word",
            "Complete the pair. English: {w}. {l}:",
        ),
        "dev": (
            "What stands at the top of the page for {w} in a {l} diary?",
            "Put {w} into {l}, please.",
            "{w}: as said by {l} speakers",
        ),
        "query": (
            "A {l} timetable has an entry for {w}. What does it print?",
            "Answer briefly: how would a {l} speaker date an invitation for {w}?",
            "Render {w} for a reader of {l}.",
        ),
        "text": (
            "In {l}, {w} is {a}.",
            "A {l} calendar shows {w} as {a}.",
            "{l} speakers say {a} for {w}.",
            "The {l} form of {w} is {a}.",
            "{a} means {w} in {l}.",
        ),
    },
    "number_abroad": {
        "pool": (
            "What is {d} in {l}?",
            "Write the number {d} in {l} words.",
            "Tell me the {l} word for {d}.",
            "Q: How do you say {d} in {l}? A:",
            "Give the {l} number word: {d}",
            "Answer briefly: {d} in {l} words?",
            "Fill in the blank: in {l}, the number {d} is ___.",
            "I am writing in {l}. How should I spell the number {d}?",
            "{d}, {l} word",
            "Complete the pair. Number: {d}. {l}:",
        ),
        "dev": (
            "What does a {l} speaker say for {d}?",
            "Put {d} into {l}, please.",
            "{d}: as counted by {l} speakers",
        ),
        "query": (
            "A {l} cheque is for {d}. How is the amount written out?",
            "Answer briefly: what do {l} children say after {m} when counting?",
            "Render the figure {d} for a reader of {l}.",
        ),
        "text": (
            "In {l}, {d} is {a}.",
            "{l} speakers count {a} for {d}.",
            "The {l} form of {d} is {a}.",
            "A {l} speaker reads {d} as {a}.",
            "{a} means {d} in {l}.",
        ),
    },
    "city_country": {
        "pool": (
            "Which country is {c} in?",
            "Name the country where {c} is.",
            "Tell me the country of {c}.",
            "Q: {c} is a city in which country? A:",
            "Give the country: {c}",
            "Answer briefly: in what country is {c}?",
            "Fill in the blank: the city of {c} is in the country of ___.",
            "I am writing about {c}. Which country should I name?",
            "country, {c}",
            "Complete the pair. City: {c}. Country:",
        ),
        "dev": (
            "What nation does {c} belong to?",
            "Name the nation on whose soil {c} stands.",
            "{c}: nation",
            "Write down the nation that {c} is part of.",
        ),
        "query": (
            "Whose flag flies over the town hall of {c}?",
            "Answer briefly: to visit {c}, whose border would I cross?",
            "Tell me what to write on the last line of a letter to {c}.",
            "People who live in {c} obey the laws of which state?",
        ),
        "text": (
            "{c} is in {x}.",
            "{c} lies in {x}.",
            "One of the cities of {x} is {c}.",
            "The city of {c} belongs to {x}.",
            "In {x} there is a city named {c}.",
        ),
    },
    "city_sentence": {
        "pool": (
            "Explain where {c} is.",
            "Describe the location of {c} in one sentence.",
            "Tell me in a full sentence where {c} is.",
            "Q: Where is {c}? Answer in a sentence. A:",
            "Give a one-sentence note on where {c} is.",
            "Write a sentence that says where {c} lies.",
            "Introduce the city of {c} in a single sentence.",
            "I am writing about {c}. Please explain its location.",
            "location of {c}, full sentence",
            "Use a whole sentence: where can {c} be found?",
        ),
        "dev": (
            "Someone asks about {c}. Reply with a short statement.",
            "Put {c} on the map for me in a line.",
            "{c}: place it, in a complete statement",
        ),
        "query": (
            "My friend has never heard of {c}. What would you say to place it?",
            "Write the opening line of a guidebook entry on {c}.",
            "In a few words with a verb, whereabouts is {c}?",
        ),
        "text": (
            "{c} is one of the cities of {x}, which lies in {k}.",
            "{c} stands in {x}, in {k}.",
            "Travellers in {k} may pass through {c} in {x}.",
            "{x}, in {k}, counts {c} among its cities.",
        ),
    },
    "borders": {
        "pool": (
            "Does {x} share a border with {y}?",
            "Say yes or no: {x} borders {y}.",
            "Tell me if {x} and {y} share a land border.",
            "Q: Do {x} and {y} border each other? A:",
            "Answer yes or no: is there a border between {x} and {y}?",
            "Answer briefly: does {x} border {y}?",
            "Fill in yes or no. {n} and {m} have a common border: ___",
            "I am writing about {x}. Does it have a border with {y}?",
            "border between {n} and {m}, yes or no",
            "Are {x} and {y} joined by a border?",
        ),
        "dev": (
            "Are {x} and {y} neighbours?",
            "Say yes or no: {x} lies next to {y}.",
            "{n}, {m}: neighbours or not, yes or no?",
            "Is {x} a neighbour of {y}?",
        ),
        "query": (
            "Could I step straight from {x} into {y}?",
            "Answer briefly: does one walk out of {x} into {y} with nothing in between?",
            "On a map, does {x} touch {y}?",
        ),
        "text": (
            "{x} and {y} [share a border|have no border in common].",
            "{x} [touches|does not touch] {y}.",
            "{x} is [a neighbour|no neighbour] of {y}.",
            "A traveller [can step|cannot step] from {x} into {y}.",
        ),
    },
    "city_choice": {
        "pool": (
            "Which of these cities is in {x}: {o}?",
            "Pick the city in {x}: {o}.",
            "Tell me which city is in {x}: {o}.",
            "Q: Which city is in {x}? Options: {o}. A:",
            "Choose a city from the list for {x}: {o}",
            "Answer briefly: which city is in {x}, {o}?",
            "Options: {o}. Which city lies in {x}?",
            "From the cities {o2}, select the one in {x}.",
            "city in {x}, {o}",
            "Only one of {o2} is a city in {x}. Name it.",
        ),
        "dev": (
            "Someone from {x} mentions home. Was it {o}?",
            "From {o2}, keep the place that belongs to {x}.",
            "{n}: match it with {o}",
        ),
        "query": (
            "A tour of {x} makes a stop. Where: {o}?",
            "Two of {o2} are elsewhere. What remains in {x}?",
            "You have landed in {x}. Did you arrive at {o}?",
        ),
        "text": (
            "Of {o2}, only {a} is in {x}.",
            "Among {o2}, {a} is the one in {x}.",
            "Two of {o2} are not in {x}, but {a} is.",
        ),
    },
    "element_symbol": {
        "pool": (
            "What is the chemical symbol of {e}?",
            "Name the symbol for the element {e}.",
            "Tell me the chemical symbol of {e}.",
            "Q: Which symbol stands for {e}? A:",
            "Give the symbol: {e}",
            "Answer briefly: which symbol does {e} have?",
            "Fill in the blank: the element {e} has the symbol ___.",
            "I am writing about {e}. Which chemical symbol should I use?",
            "symbol, {e}",
            "Complete the pair. Element: {e}. Symbol:",
            "Do you know the symbol of the element {e}?",
        ),
        "dev": (
            "How do chemists abbreviate {e}?",
            "Which letters mark {e} in a formula?",
            "{e}: letters in the periodic table",
            "Write {e} as it stands in a formula.",
        ),
        "query": (
            "Which short form labels a bottle of {e} in the laboratory?",
            "Answer briefly: how is {e} written in an equation?",
            "Tell me what scientists put down instead of the full word {e}.",
            "What stands for {e} on a wall chart in a science class?",
        ),
        "text": (
            "The symbol for {e} is {a}.",
            "In formulas {e} is written {a}.",
            "The letters {a} stand for {e}.",
            "{e} is shortened to {a}.",
            "Chemists write {a} for {e}.",
        ),
    },
    "element_sentence": {
        "pool": (
            "Describe the element {e} in one sentence.",
            "Tell me in a full sentence what {e} is.",
            "Q: What is {e}? Answer in a sentence. A:",
            "Give a one-sentence note on what {e} is.",
            "Write a sentence about the chemical element {e}.",
            "Introduce the element {e} in a single sentence.",
            "I am writing about {e}. Please explain what it is.",
            "element {e}, full sentence",
            "Use a whole sentence: what kind of element is {e}?",
            "Explain what {e} is.",
            "Answer in a sentence: what should I know about {e}?",
        ),
        "dev": (
            "Someone asks about {e}. Reply with a short statement.",
            "Place {e} in the periodic table for me in a line.",
            "{e}: define it, in a complete statement",
            "Put {e} into its chemical family, in a line.",
        ),
        "query": (
            "My friend has never heard of {e}. What would you say to define it?",
            "Write the opening line of an encyclopedia entry on {e}.",
            "In a few words with a verb, what sort of substance is {e}?",
        ),
        "text": (
            "{e} is {k} that chemists write as {s}.",
            "{e} is number {z} in the periodic table.",
            "The atomic number of {e} is {z}.",
            "{e} counts as {k}.",
        ),
    },
    "number_words": {
        "pool": (
            "Write the number {d} in words.",
            "What is {d} in words?",
            "Tell me how to write {d} in words.",
            "Q: How is the number {d} written in words? A:",
            "Give the number in words: {d}",
            "Answer briefly: {d} in English words?",
            "Fill in the blank: the number {d} is written in words as ___.",
            "I am writing a report. How should I spell the number {d}?",
            "{d}, in words",
            "Complete the pair. Number: {d}. Words:",
        ),
        "dev": (
            "How do you read {d} aloud?",
            "Turn the digits {d} into text.",
            "{d}: as read aloud",
        ),
        "query": (
            "Someone speaks the figure {d}. What do you hear?",
            "Replace the figure {d} by plain text.",
            "Answer briefly: how would {d} be pronounced?",
        ),
        "text": (
            "{d} is read {a}.",
            "The number {d} is spelled {a}.",
            "{a} is the same as {d}.",
            "In words {d} becomes {a}.",
        ),
    },
    "ordinal": {
        "pool": (
            "What is the ordinal of {d}?",
            "Write the ordinal form of {d} in words.",
            "Tell me the ordinal word for {d}.",
            "Q: Which ordinal goes with {d}? A:",
            "Give the ordinal: {d}",
            "Answer briefly: what is {d} as an ordinal?",
            "Fill in the blank: the ordinal number for {d} is ___.",
            "I am writing a list. Which ordinal should I use for item {d}?",
            "{d}, ordinal",
            "Complete the pair. Number: {d}. Ordinal:",
        ),
        "dev": (
            "Turn the count {d} into a rank word.",
            "Which rank word matches {d}?",
            "{d}: as a rank, spelled out",
        ),
        "query": (
            "A runner finishes in place {d}. How do you describe that finish?",
            "{m} people are ahead of me in the queue. What position am I in?",
            "Answer briefly: someone turns {d}. What birthday is it?",
        ),
        "text": (
            "After {m} others, one is {a}.",
            "Place {d} is the {a} place.",
            "The item at position {d} is the {a}.",
            "Whoever is number {d} in line is {a}.",
        ),
    },
    "roman": {
        "pool": (
            "What is {d} in Roman numerals?",
            "Write {d} as a Roman numeral.",
            "Tell me the Roman numeral for {d}.",
            "Q: How is {d} written in Roman numerals? A:",
            "Give the Roman numeral: {d}",
            "Answer briefly: {d} in Roman numerals?",
            "Fill in the blank: in Roman numerals the number {d} is ___.",
            "I am writing a list. What is {d} as a Roman numeral?",
            "{d}, Roman numeral",
            "Complete the pair. Number: {d}. Roman numeral:",
        ),
        "dev": (
            "How would Julius Caesar have noted {d}?",
            "Turn {d} into the old style with I, V and X.",
            "{d}: in Latin style",
        ),
        "query": (
            "What would a mason in ancient Italy carve for {d}?",
            "An old stone shows the figure {d}. What does it look like?",
            "Answer briefly: how did the Caesars put down an amount of {d}?",
        ),
        "text": (
            "The Romans wrote {a} for {d}.",
            "{a} is {d} in Roman numerals.",
            "In Roman numerals {d} becomes {a}.",
            "The Roman figure {a} means {d}.",
        ),
    },
    "plural": {
        "pool": (
            "What is the plural of {w}?",
            "Write the plural form of {w}.",
            "Tell me the plural of the noun {w}.",
            "Q: What is the plural form of the word {w}? A:",
            "Give the plural: {w}",
            "Answer briefly: what is {w} in the plural?",
            "Fill in the blank: the plural of {w} is ___.",
            "I am writing about {w} in the plural. Which form should I use?",
            "plural, {w}",
            "Complete the pair. Singular: {w}. Plural:",
        ),
        "dev": (
            "Change {w} so that it means many.",
            "{w}: more than one",
            "Which form of {w} follows the word many?",
        ),
        "query": (
            "First there was a single {w}, then three more came. Three what?",
            "Put the right word after two: {w}",
            "Answer briefly: one {w}, but ten of what?",
        ),
        "text": (
            "One {w}, two {a}.",
            "Several of the kind {w} are {a}.",
            "The word {w} becomes {a} when there are many.",
            "There was one {w} at first and later there were many {a}.",
        ),
    },
    "past_tense": {
        "pool": (
            "What is the past tense of {w}?",
            "Write the past tense form of the verb {w}.",
            "Tell me the past tense of to {w}.",
            "Q: What is the past form of the verb {w}? A:",
            "Give the past tense: {w}",
            "Answer briefly: what is {w} in the past tense?",
            "Fill in the blank: the past tense of {w} is ___.",
            "I am writing in the past tense. Which form of {w} should I use?",
            "past tense, {w}",
            "Complete the pair. Present: {w}. Past:",
        ),
        "dev": (
            "Change {w} so that it happened yesterday.",
            "{w}: as said of last week",
            "Which form of {w} follows the words last year they?",
        ),
        "query": (
            "Today they {w}. The day before they did so too. Put that in one word.",
            "Put the right word after long ago she: {w}",
            "Answer briefly: now we {w}, but an hour ago we what?",
        ),
        "text": (
            "Today they {w}, and yesterday they {a}.",
            "They used to {w}; last year they {a} every day.",
            "The verb {w} becomes {a} in the past.",
            "Now people {w}, and long ago people {a}.",
        ),
    },
    "reverse": {
        "pool": (
            "Spell {w} backwards.",
            "Write the word {w} in reverse.",
            "Tell me how {w} is spelled backwards.",
            "Q: What is {w} in reverse? A:",
            "Give the reverse: {w}",
            "Answer briefly: what is the word {w} backwards?",
            "Fill in the blank: {w} spelled backwards is ___.",
            "I am making a puzzle. What is {w} in reverse?",
            "{w}, backwards",
            "Complete the pair. Word: {w}. Backwards:",
        ),
        "dev": (
            "Turn {w} around, last letter first.",
            "Read {w} from right to left.",
            "{w}: flip it",
        ),
        "query": (
            "Hold {w} up to a mirror. What string of letters appears?",
            "Start at the end of {w} and finish at its beginning. What do you get?",
            "Answer briefly: what does {w} become when its order is swapped round?",
        ),
        "text": (
            "Backwards, {w} is {a}.",
            "The word {w} turned around is {a}.",
            "The letters {a} are {w} in reverse.",
            "From right to left, {w} reads {a}.",
        ),
    },
    "spelling": {
        "pool": (
            "Spell the word {w}.",
            "Write the word {w} letter by letter.",
            "Tell me how to spell {w}.",
            "Q: How do you spell {w}? A:",
            "Give the spelling: {w}",
            "Answer briefly: how is the word {w} spelled?",
            "Fill in the blank: letter by letter, {w} is spelled ___.",
            "I am making a puzzle. How do you spell {w}?",
            "{w}, letter by letter",
            "Complete the pair. Word: {w}. Spelling:",
        ),
        "dev": (
            "Break {w} into its characters.",
            "Separate {w} with hyphens.",
            "{w}: one character at a time",
        ),
        "query": (
            "Dictate {w} slowly over a bad telephone line.",
            "Put a dash between all neighbours in {w}.",
            "Answer briefly: which signs, in order, make up {w}?",
        ),
        "text": (
            "The word {w} is spelled {a}.",
            "The letters {a} make {w}.",
            "Letter by letter {w} is {a}.",
            "A child who says {a} has spelled {w}.",
        ),
    },
    "alphabetical": {
        "pool": (
            "Which word comes [first|last] in the alphabet: {o}?",
            "Name the word that comes [first|last] in alphabetical order: {o}.",
            "Tell me which word is alphabetically [first|last]: {o}.",
            "Q: In alphabetical order, which word is [first|last]: {o}? A:",
            "Give the alphabetically [first|last] word: {o}",
            "Answer briefly: of {o}, which is [first|last] in alphabetical order?",
            "Sort the words by the alphabet and keep the [first|last]: {o}.",
            "I am making a list. Which word goes [first|last] alphabetically, {o}?",
            "{o}; alphabetically [first|last]",
            "Complete the pair. Words: {o}. Alphabetically [first|last]:",
        ),
        "dev": (
            "In a dictionary, which entry appears [earliest|latest]: {o}?",
            "Arrange {o} from A to Z and keep the [top|bottom] entry.",
            "{o}: the entry [closest to A|closest to Z]",
        ),
        "query": (
            "Leafing through a lexicon, what would you meet [soonest|at the very end]: {o}?",
            "Three index cards say {o}. What is filed at the [front|back]?",
            "Answer briefly: in a telephone book, {o}, who is listed [above|below] the others?",
        ),
        "text": (
            "Of {o}, the [first|last] in the dictionary is {a}.",
            "The entry {a} comes [before|after] the other two among {o}.",
            "Filed from A to Z, {o} [begin|end] with {a}.",
        ),
    },
    "addition": {
        "pool": (
            "What is {p} plus {q}?",
            "Add {p} and {q}.",
            "Tell me the sum of {p} and {q}.",
            "Q: What is {p} + {q}? A:",
            "Give the sum: {p} + {q}",
            "Answer briefly: what is {p} + {q}?",
            "Fill in the blank: {p} + {q} = ___",
            "I am checking a list. What is the sum of {p} and {q}?",
            "{p} plus {q}, sum",
            "Complete the pair. Addition: {p} + {q}. Result:",
        ),
        "dev": (
            "How much are {p} and {q} together?",
            "Start from {p} and go up by {q}.",
            "{p} and {q}: total",
        ),
        "query": (
            "Put {q} on top of {p}. How much is there now?",
            "One shelf holds {p} books, another {q}. How many is that altogether?",
            "Answer briefly: {p} grows by {q} and becomes what?",
        ),
        "text": (
            "{p} plus {q} makes {a}.",
            "{p} and {q} make {a}.",
            "{a} is {p} and {q} together.",
            "The sum {p} + {q} comes to {a}.",
            "Adding {q} to {p} yields {a}.",
        ),
    },
    "word_problem": {
        "pool": (
            "{who} has {p} {i} and [buys {q} more|gives away {q}]. How many {i} does {who} have?",
            "Answer in a sentence: {who} had {p} {i} and then [got {q} more|lost {q}]. "
            "How many now?",
            "{who} owns {p} {i}. {who} [buys another {q}|sells {q} of them]. "
            "Tell me how many {i} {who} has.",
            "Q: {who} starts with {p} {i} and [finds {q} more|loses {q}]. "
            "How many {i} does {who} have? A:",
            "Word problem: {p} {i} for {who}, then [{q} more|{q} fewer]. "
            "Give the result in a sentence.",
            "{who} has {p} {i} and [receives {q}|throws away {q}]. "
            "In a full sentence, how many {i} are there?",
            "I am checking a story. {who} had {p} {i} and [was given {q}|sold {q}]. "
            "How many does {who} have?",
            "There are {p} {i} on the table of {who}, who [adds {q}|removes {q}]. "
            "How many {i} does {who} have?",
            "{who}, {p} {i}, [{q} more|{q} fewer], full sentence",
        ),
        "dev": (
            "[After buying {q} {i} on top of {p}|After handing over {q} of {p} {i}], "
            "what does {who} hold?",
            "{who} counted {p} {i} on Monday, and on Tuesday [{q} extra came|{q} went missing]. "
            "State the new total.",
            "State what {who} is left with: {p} {i}, [plus {q}|minus {q}].",
        ),
        "query": (
            "In the morning the bag of {who} held {p} {i}. By noon "
            "[{q} were put in|{q} were taken out]. What is in it?",
            "{who} brought {p} {i} to the fair and [won {q}|dropped {q}] there. "
            "Say what {who} carries home.",
            "A box of {p} {i} belongs to {who}. Then {q} [arrive|disappear]. What does that leave?",
        ),
        "text": (
            "{who} kept {p} {i}, then [bought {q}|gave {q} to a friend], "
            "and so came to have {r} {i}.",
            "With {p} {i} and [{q} more|{q} fewer], {who} had {r}.",
            "{who} began the day with {p} {i} and ended it with {r}, "
            "after [getting {q}|losing {q}].",
        ),
    },
    "comparison": {
        "pool": (
            "Which number is [larger|smaller], {p} or {q}?",
            "Name the [larger|smaller] number: {p} or {q}.",
            "Tell me which number is [larger|smaller]: {p} or {q}.",
            "Q: Which of {p} and {q} is [larger|smaller]? A:",
            "Give the [larger|smaller] number: {p}, {q}",
            "Answer briefly: is {p} or {q} the [larger|smaller] number?",
            "Fill in the blank: of {p} and {q}, the [larger|smaller] number is ___.",
            "I am checking a list. Which is [larger|smaller], {p} or {q}?",
            "{p}, {q}; the [larger|smaller] number",
            "Complete the pair. Numbers: {p} and {q}. The [larger|smaller]:",
        ),
        "dev": (
            "Between {p} and {q}, which is [greater|lesser]?",
            "Keep the [greater|lesser] value of {p} and {q}.",
            "{p} or {q}: the [greater|lesser]",
        ),
        "query": (
            "One jar holds {p} beans, another {q}. What does the [fuller|emptier] jar hold?",
            "Team A scored {p} points, team B {q}. What was the [winning|losing] score?",
            "Answer briefly: a child counts from one. What is reached [later|sooner], {p} or {q}?",
        ),
        "text": (
            "{a} is [larger|smaller] than {b}.",
            "{b} is [less|more] than {a}.",
            "Between {p} and {q} the [greater|lesser] is {a}.",
            "Counting up, {a} comes [after|before] {b}.",
        ),
    },
    "sorting": {
        "pool": (
            "Sort these numbers in [ascending|descending] order: {o}.",
            "Put the numbers {o} in [ascending|descending] order.",
            "Tell me these numbers from [smallest to largest|largest to smallest]: {o}.",
            "Q: What is {o} in [ascending|descending] order? A:",
            "Give in [ascending|descending] order: {o}",
            "Answer briefly: how do the numbers {o} sort, [smallest|largest] first?",
            "Sort {o} with the [smallest|largest] number first.",
            "I am making a list. Sort {o} from [smallest to largest|largest to smallest].",
            "{o}; [ascending|descending] order",
            "Complete the pair. Numbers: {o}. In [ascending|descending] order:",
        ),
        "dev": (
            "Line up {o} so that they [rise|fall].",
            "Rank {o} with the [lowest|highest] at the front.",
            "{o}: line them up, [rising|falling]",
        ),
        "query": (
            "Three ropes are {o} feet long. "
            "Write their lengths, the [shortest|longest] at the start.",
            "Players scored {o}. Read out the table from the [bottom up|top down].",
            "Answer briefly: count [up from zero|down from a thousand]. "
            "How do you meet {o} on the way?",
        ),
        "text": (
            "Going [up|down], {o} become {a}.",
            "The three values {o} line up as {a}, the [lowest|highest] leading.",
            "[Lowest|Highest] at the front, it runs {a}.",
        ),
    },
    "sequence": {
        "pool": (
            "What is the next number: {s}?",
            "Continue the sequence: {s}",
            "Tell me the next number in the sequence {s}.",
            "Q: Which number comes next in {s}? A:",
            "Give the next number: {s}",
            "Answer briefly: what comes next in the sequence {s}?",
            "Fill in the blank: {s}, ___",
            "I am making a puzzle. What is next in the sequence {s}?",
            "{s}, next number",
            "Complete the sequence by one number: {s}",
        ),
        "dev": (
            "Carry the pattern {s} one step further.",
            "Which value does the pattern {s} lead to?",
            "{s}: and then?",
        ),
        "query": (
            "Someone counts {s} and pauses. What will they say?",
            "House doors on a street read {s}. What is on the following door?",
            "Answer briefly: guess the term that {s} is heading for.",
        ),
        "text": (
            "The row {s} goes on with {a}.",
            "After {s} comes {a}.",
            "{s} and {a} follow one rule.",
            "The pattern {s} leads to {a}.",
        ),
    },
    "conversion": {
        "pool": (
            "Convert {v} to {u}.",
            "How many {u} are there in {v}?",
            "Tell me {v} in {u}.",
            "Q: How many {u} make {v}? A:",
            "Give the amount in {u}: {v}",
            "Answer briefly: what is {v} in {u}?",
            "Fill in the blank, in {u}: {v} = ___",
            "I am checking a list. What is {v} converted to {u}?",
            "{v} in {u}",
            "Complete the pair. Amount: {v}. In {u}:",
        ),
        "dev": (
            "Express {v} using {u}.",
            "Change the unit of {v} to {u}.",
            "{v}: as {u}",
        ),
        "query": (
            "A measuring device only shows {u}. What does it display for {v}?",
            "If I split {v} up into {u}, what do I get?",
            "Answer briefly: {v} equals what, counted in {u}?",
        ),
        "text": (
            "{v} is the same as {a}.",
            "{a} add up to {v}.",
            "There are {a} in all of {v}.",
            "{v} and {a} are equal.",
        ),
    },
}

#: Domain of each task: the ``task`` label of a pretraining document.
DOMAINS: dict[str, str] = {
    "capital": "countries",
    "currency": "countries",
    "continent": "countries",
    "country_code": "countries",
    "calling_code": "countries",
    "official_language": "countries",
    "country_abroad": "translations",
    "language_abroad": "translations",
    "calendar_abroad": "translations",
    "number_abroad": "translations",
    "city_country": "cities",
    "city_sentence": "cities",
    "borders": "countries",
    "city_choice": "cities",
    "element_symbol": "elements",
    "element_sentence": "elements",
    "number_words": "numbers",
    "ordinal": "numbers",
    "roman": "numbers",
    "plural": "grammar",
    "past_tense": "grammar",
    "reverse": "letters",
    "spelling": "letters",
    "alphabetical": "letters",
    "addition": "arithmetic",
    "word_problem": "arithmetic",
    "comparison": "order",
    "sorting": "order",
    "sequence": "order",
    "conversion": "units",
}

NOUNS: tuple[str, ...] = tuple(
    """
    actor address airport alley analysis anchor angel animal ankle apple apron arch armchair army
    arrow artist aunt axis baby badge bakery balcony ball banana bandage banjo basis basket beach
    bear beaver bee beetle bell belly bench berry bicycle bird blanket blouse boat body bottle
    bowl box boy branch bridge brick brother brush bucket building bus bush butterfly button
    cabbage cactus cage cake calf camel camera campus candle candy canoe canyon captain car
    carpet carrot castle cat cathedral cave ceiling century chair chef cherry chicken child chimney
    church circus city class clock cloud coach coat coin column compass cookie copy corner cottage
    country cousin cow crab crisis cross crow crown cup curtain cushion daisy dancer deer desk
    diagnosis diary dictionary diploma dish doctor dog dolphin donkey door dragon drawer dress
    driver drum duck eagle ear echo eel elbow elephant elf emperor engine envelope eye factory
    fairy family farmer feather fence ferry field finger fireman fish flag flower fly fork fox
    foot forest fountain friend frog fruit galaxy gallery garden gate giraffe girl glass
    glove goat goose grape grass guest guitar half hammer hammock hand harbour hat hawk helmet
    hero hill horse hospital hotel house hypothesis igloo insect iron island jacket jar jelly
    jewel judge jungle kettle key king kitchen kitten kiwi knee knife ladder lady lake lamp lantern
    leaf leg lemon leopard letter library lighthouse lion lizard loaf lobster lock lorry louse
    lunch machine magnet man mango map market match meadow medal melon memory mirror mitten
    monkey month mosquito moth mountain mouse mouth mushroom museum nail necklace needle nephew
    nest niece nose notebook nurse oasis ocean office onion orange orchard orphan ostrich otter
    oven owl ox oyster paintbrush palace pan parrot party passenger path peach peacock pear pen
    pencil penguin pepper person phenomenon photo piano picture pig pillow pilot planet plate
    pocket poem policeman pond pony poppy potato prince princess prize puppy purse puzzle queen
    quilt rabbit radio radish rainbow raven reef ribbon ring river road robot roof room rope rose
    ruby ruler saddle sailor salad sandwich saucer scarf school seal secretary shark sheep shelf
    shell ship shirt shoe shop shoulder sister sketch skirt sky slipper snail snake sofa soldier
    song spider sponge spoon spy squirrel stadium stairway star station statue stone story stove
    strawberry street student studio suitcase sunflower supper swan sweater sword table tailor
    tank teacher temple tent thesis thumb ticket tiger tomato tooth torch tortoise towel
    tower toy train tray treasure tree trophy trumpet tulip tunnel turkey turtle umbrella uncle
    university valley vase village violin volcano waiter wall walrus watch waterfall whale
    wheel whistle wife window wing witch wolf woman worm wreath wrist yacht year zebra
    """.split()
)

VERBS: tuple[str, ...] = tuple(
    """
    accept admire admit agree allow answer appear apply argue arrange arrive ask bake bathe beg
    begin believe bend bite bleed blow boil borrow bounce bow break breathe bring brush build burst
    bury buy call camp carry carve catch celebrate change charge chase cheer chew choose clap
    clean climb close collect come compare complain complete cook copy count cover crawl creep
    cross cry dance decide deliver deny describe deserve dig discover divide draw dream dress
    drink drive drop dry earn eat enjoy enter escape explain explore fail fall fasten feed feel
    fetch fight fill find finish fix float flow fly fold follow forget forgive freeze frighten fry
    gather give glow go grab grin grind grow guess hang happen harvest hear help hide hit hold hop
    hope hug hunt hurry imagine improve include invent invite join judge juggle jump keep kick
    kneel knock know land laugh lead learn leave lend lift like listen live lock look lose
    love make march marry measure meet melt mend mix move multiply need notice obey offer open
    order own pack paint park pass pay peel phone pick plan plant play plough point polish
    pour practise praise pray prefer prepare pretend print promise protect pull punish push
    put quarrel reach read receive recognise refuse remain remember remove repair repeat
    reply rescue rest return ride ring rise rob roll row rub run sail save say scratch scream
    search see seek sell send serve settle shake share shine shiver shoot shop shout show shrink
    shut sing sink sit skate skip sleep slide slip smile sneeze snore solve speak spend
    spin split spoil spread spring stand stare start stay steal step stick sting stir stop
    strike study succeed suffer suggest supply support surprise swear sweep swim swing switch
    take talk taste teach tear tell thank think throw tie touch trade train travel trot try turn
    type understand use vanish visit wait wake walk wander want warn wash waste watch wave wear
    weave weep weigh whisper whistle win wink wipe wish wonder work worry wrap wrestle write yawn
    yell
    """.split()
)

PEOPLE: tuple[str, ...] = tuple(
    """
    Ada Ali Amina Ana Anton Ben Carla Chen Clara David Elena Emil Fatima Felix Grace Hana Hugo
    Ines Ivan Jonas Julia Kofi Lara Leo Lina Lucia Marco Maria Mina Nadia Nils Noor Olga Omar
    Paula Pedro Rosa Ruth Sam Sara Tariq Tom Vera Yuki Zoe
    """.split()
)

ITEMS: tuple[str, ...] = tuple(
    """
    apples balls bananas beads bells books bottles boxes bricks buttons cakes cards carrots chairs
    coins cookies cups eggs flowers grapes hats kites keys lemons marbles melons nuts oranges
    pears pencils plates plums ribbons ropes shells shirts spoons stamps stickers stones tickets
    """.split()
)

#: (unit, units, target units, factor): one ``unit`` is ``factor`` target units.
CONVERSIONS: tuple[tuple[str, str, str, int], ...] = (
    ("kilometre", "kilometres", "metres", 1000),
    ("metre", "metres", "centimetres", 100),
    ("centimetre", "centimetres", "millimetres", 10),
    ("kilogram", "kilograms", "grams", 1000),
    ("gram", "grams", "milligrams", 1000),
    ("tonne", "tonnes", "kilograms", 1000),
    ("litre", "litres", "millilitres", 1000),
    ("litre", "litres", "centilitres", 100),
    ("minute", "minutes", "seconds", 60),
    ("hour", "hours", "minutes", 60),
    ("day", "days", "hours", 24),
    ("week", "weeks", "days", 7),
    ("year", "years", "months", 12),
    ("decade", "decades", "years", 10),
    ("century", "centuries", "years", 100),
    ("foot", "feet", "inches", 12),
    ("yard", "yards", "feet", 3),
    ("mile", "miles", "yards", 1760),
    ("pound", "pounds", "ounces", 16),
    ("gallon", "gallons", "pints", 8),
    ("hectare", "hectares", "square metres", 10000),
    ("kilobyte", "kilobytes", "bytes", 1000),
    ("byte", "bytes", "bits", 8),
)
