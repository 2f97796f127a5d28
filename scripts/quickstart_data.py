"""Generate the quickstart task: a free-form message about an appointment -> one JSON object.

    python scripts/quickstart_data.py FOLDER          # writes FOLDER/train.jsonl and FOLDER/test.jsonl

    "Could you pencil in a quarterly budget review with Maya Lindqvist on the 5th of March 2027, half past
     three in the afternoon?"
    {"what": "quarterly budget review", "who": "Maya Lindqvist", "date": "2027-03-05", "time": "15:30"}

The score has to mean something, so the two files share no first name, no last name, no qualifier, no noun, no
phrasing, no calendar date and no time of day: a model can only answer a test row by copying what it reads and by
normalising what it has not seen. (With 30 whole titles in the training rows a 135M model memorised them instead of
learning to copy, and stayed at 45 %: hence titles and names composed from larger lists.)

Deterministic: the same seed gives the same bytes on every Python from 3.10 on.
"""

import argparse
import calendar
import hashlib
import json
import random
from pathlib import Path

SYSTEM = "Turn the message into JSON."

# ---- values: every list is (train, test), with nothing in common ------------------------------------------------
FIRST_NAMES = (
    """Aaron Abigail Adrian Agnes Ahmed Alice Amara Andre Anita Antonio Beatrice Benjamin Bianca Boris Brenda Carlos
    Carmen Cedric Chloe Claudia Colin Daniela Darius Deborah Dmitri Edith Eduardo Elena Emil Esther Fatima Felix
    Fiona Frank Gabriel Georgia Gustav Hannah Hassan Helen Henrik Ibrahim Ingrid Irene Ivan Jasmine Jerome Joanna
    Julius Karim Katrin Kenji Lars Laura Leila Leon Lucia Malik Marcus Marina Martha Mateo Melissa Mikhail Monica
    Nadia Nathan Nina Noah Olga Oscar Patricia Pavel Philip Priya Rachel Rafael Rebecca Robert Rosa Ruben Samira
    Sandra Sergei Simon Sofia Stefan Tamara Theo Thomas Tobias Ursula Valentin Vera Victor Walter Yasmin Yuri""".split(),
    """Arjun Astrid Bruno Celeste Cyrus Delia Dominic Elsa Ernest Farah Gerard Gloria Hugo Imogen Isaac Jonas Keiko
    Lorenzo Maya Miriam Nikolai Odette Quentin Rowan Selma Silvio Tessa Ulrich Wanda Zara""".split(),
)
LAST_NAMES = (
    """Abbott Almeida Andersson Baker Barros Becker Bennett Bergman Bishop Blake Bogdanov Brandt Brennan Carver
    Castillo Chandra Chen Cohen Cooper Costa Crawford Dalton Davies Delgado Dietrich Dixon Donovan Doyle Dubois
    Eriksen Espinoza Farrell Fernandez Fischer Fleming Foster Fuentes Gallagher Garcia Gibson Goldberg Gruber Gupta
    Haddad Hansen Harper Hassan Hoffman Holt Hughes Ibarra Ito Jensen Johansson Kapoor Keller Kimura Kowalski Kruger
    Lambert Larsen Lopez Maddox Marino Mendes Meyer Mitchell Morales Moreau Murphy Nakamura Navarro Nguyen Nielsen
    Novak Olsen Ortega Palmer Parker Pereira Petrov Quinn Ramirez Reyes Ricci Romero Rossi Russo Santos Schmidt
    Shah Silva Sokolov Suzuki Tanaka Torres Vargas Wagner Walsh Weber Yamamoto Ziegler""".split(),
    """Achebe Aldridge Bauer Calloway Connelly Drummond Eastwood Faulkner Grimaldi Hawthorne Iyer Jankowski Kaplan
    Lindqvist Marchetti Nwosu Okafor Pemberton Rahman Sandoval Thornton Underwood Vasquez Whitaker Zhang""".split(),
)
QUALIFIERS = (
    """annual monthly weekly quarterly private short long final first second introductory advanced online urgent
    informal group summer winter spring autumn legal medical dental technical financial regional seasonal joint
    internal external formal routine follow-up emergency preliminary optional extended practical evening weekend
    family senior junior outdoor indoor German Spanish Italian chemistry history marketing software
    birthday wedding garden kitchen bathroom roof engine bicycle laptop camera violin cello trumpet ballet yoga pilates
    tennis chess pottery ceramics poetry opera jazz vintage organic part-time full-day two-hour all-hands one-on-one
    cross-team mid-year pre-season post-launch bilateral multilingual coastal alpine Portuguese Swedish Turkish Arabic
    Latin biology geometry economics accounting insurance mortgage pension passport dermatology cardiology orthopedic
    dietary prenatal veterinary archaeological botanical""".split(),
    """biannual half-day beginner guided premium mandatory fortnightly public musical academic national French
    Japanese physics hardware pediatric tactical rooftop midterm bilingual""".split(),
)
NOUNS = (
    """check-up|review|lesson|interview|inspection|consultation|rehearsal|workshop|training|meeting|haircut|massage
    |delivery|repair|fitting|viewing|tour|seminar|audit|briefing|call|session|exam|cleaning|photo shoot|breakfast
    |lunch|dinner|tasting|hearing|demo|orientation|budget review|piano lesson|site visit|eye test|team meeting
    |car service|strategy talk|driving lesson|board meeting|project update|house viewing|job interview|screening
    |handover|installation|measurement|negotiation|presentation|recording|reception|renewal|retrospective|signing
    |survey|translation check|tune-up|upgrade|webinar|wine tasting|class reunion|contract review|flat inspection""",
    """appraisal|walkthrough|vaccination|debate|tutorial|assessment|kick-off|planning meeting|guitar lesson|blood test
    |boiler service|design critique|product launch|garden tour|sales pitch|mock trial""",
)
NOUNS = tuple([" ".join(noun.split()) for noun in nouns.split("|")] for nouns in NOUNS)
YEARS = (range(2025, 2036), range(2025, 2036))  # years are only copied; dates as a whole are disjoint, see _held_out

# ---- phrasings ----------------------------------------------------------------------------------------------------
PHRASINGS = (
    """Please book a {what} with {who} on {date} at {time}.
    Can you schedule the {what} with {who} for {date} at {time}?
    Hi, I need a {what} with {who}, {date}, {time}. Thanks!
    {who} has confirmed the {what} for {date} at {time}.
    Put the {what} with {who} in my calendar: {date}, {time}.
    On {date} at {time} I have a {what} with {who}.
    The {what} is on {date} at {time}, and {who} will be there.
    {who} asked to move the {what} to {date} at {time}.
    Reminder: {what}, {date} at {time}, with {who}.
    Let's do the {what} at {time} on {date}. {who} is free then.
    At {time} on {date} there is a {what} with {who}.
    I spoke to {who} and we agreed on {date} at {time} for the {what}.
    Could we meet for the {what} on {date}? {time} suits {who}.
    Your {what} with {who} has been set for {time} on {date}.
    Hello, {who} here. I would like a {what} on {date} at {time}.
    New appointment with {who}: {what} on {date} at {time}.
    We have room for your {what} at {time} on {date}; ask for {who}.
    Is {who} available for a {what} on {date} at {time}?
    To do: {what}, {who}, {date}, {time}.
    {what} - {who} - {date} - {time}
    Great, {date} at {time} is fine for {who}, so we keep the {what}.
    Please tell {who} that my {what} is at {time} on {date}.
    Remember that {who} is visiting on {date} at {time} for the {what}.
    Sorry for the delay; your {what} can take place on {date} at {time} with {who}.""",
    """Could you pencil in a {what} with {who} on {date}, at {time}?
    {who} would like to have the {what} on {date} at {time}, if possible.
    Just to confirm, the {what} with {who} takes place at {time} on {date}.
    Good news: {date} at {time} works for {who}, so the {what} can go ahead.
    Don't forget that on {date} at {time} {who} is coming over for the {what}.
    Add this please - {what}, {who}, {date}, {time}.
    I'd prefer to see {who} for my {what} on {date} at {time}.
    We have moved your {what}; {who} expects you on {date} at {time}.""",
)
PHRASINGS = tuple([line.strip() for line in phrasings.splitlines()] for phrasings in PHRASINGS)

HOUR_WORDS = "twelve one two three four five six seven eight nine ten eleven".split()


def _ordinal(day):
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _date_text(rng, year, month, day):
    name = calendar.month_name[month]
    forms = (
        f"{name} {day}, {year}",
        f"{day} {name} {year}",
        f"the {_ordinal(day)} of {name} {year}",
        f"{name} {_ordinal(day)} {year}",
    )
    return rng.choice(forms)


def _time_text(rng, hour, minute):
    half = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    clock = f"{hour % 12 or 12}:{minute:02d}"
    forms = [f"{hour:02d}:{minute:02d}", f"{clock} {'am' if hour < 12 else 'pm'}"]
    if minute == 0:
        forms += [f"{hour % 12 or 12} {'am' if hour < 12 else 'pm'}", f"{HOUR_WORDS[hour % 12]} o'clock {half}"]
    elif minute == 30:
        forms += [f"half past {HOUR_WORDS[hour % 12]} {half}"] * 2
    elif minute == 15:
        forms += [f"a quarter past {HOUR_WORDS[hour % 12]} {half}"] * 2
    return rng.choice(forms)


def _held_out(*value):
    """True for the fifth of all dates (year, month, day) and times (hour, minute) that only test rows may use."""
    return hashlib.sha256(repr(value).encode()).digest()[0] % 5 == 0


def make_row(rng, split):
    """One conversation as a dict with `messages`; `split` is 0 for train, 1 for test."""
    wanted = bool(split)
    while True:
        year, month = rng.choice(YEARS[split]), rng.randint(1, 12)
        day = rng.randint(1, calendar.monthrange(year, month)[1])
        if _held_out(year, month, day) == wanted:
            break
    while True:
        hour, minute = rng.randint(7, 20), rng.choice((0, 0, 15, 30, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55))
        if _held_out(hour, minute) == wanted:
            break
    what = f"{rng.choice(QUALIFIERS[split])} {rng.choice(NOUNS[split])}"
    who = f"{rng.choice(FIRST_NAMES[split])} {rng.choice(LAST_NAMES[split])}"
    message = rng.choice(PHRASINGS[split]).format(
        what=what, who=who, date=_date_text(rng, year, month, day), time=_time_text(rng, hour, minute)
    )
    answer = {"what": what, "who": who, "date": f"{year}-{month:02d}-{day:02d}", "time": f"{hour:02d}:{minute:02d}"}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message[0].upper() + message[1:]},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def write(path, num_rows, split, seed):
    """Write `num_rows` distinct rows to `path` as JSON lines."""
    rng = random.Random(f"{seed}/{split}")
    seen = set()
    with open(path, "w", encoding="utf-8") as file:
        while len(seen) < num_rows:
            line = json.dumps(make_row(rng, split))
            if line not in seen:
                seen.add(line)
                file.write(line + "\n")


def main(doc=__doc__, write=write, train_rows=1200, names=("train.jsonl", "test.jsonl"), what="rows"):
    """Write the files that the command line asks for. write(path, number of rows, split, seed)."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-rows", type=int, default=train_rows)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, (name, number) in enumerate(zip(names, (args.train_rows, args.test_rows), strict=True)):
        write(args.folder / name, number, split, args.seed)
    print(f"wrote {args.train_rows} training and {args.test_rows} test {what} to {args.folder}")


if __name__ == "__main__":
    main()
