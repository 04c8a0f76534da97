"""Hard cases, one line each: where a sentence, a clause or a comma may be cut, and what a voice gets to say."""

import pytest

from worker.core.shaping.clean import Cleaner
from worker.core.shaping.cut import Cutting, Lengths
from worker.core.shaping.markup import Clean
from worker.core.shaping.shaper import Piece, Shaper, Shaping

NEVER = 10_000
AT_SENTENCES = (Lengths(sentence=1, clause=NEVER, comma=NEVER, word=NEVER),)
AT_CLAUSES = (Lengths(sentence=1, clause=1, comma=1, word=NEVER),)
AT_WORDS = (Lengths(sentence=1, clause=1, comma=1, word=1),)

# `¦` marks every cut there is.
SENTENCES = [
    # numbers
    ("en", "Pi is 3.14 and a bit. ¦It never ends."),
    ("en", "That costs $1,000.50 today. ¦Tomorrow it is more."),
    ("en", "Version 2.0.1 is out! ¦Get it now."),
    ("en", "It was 1999. ¦Then came 2000."),
    ("en", "Chapter 3. ¦Let us begin."),
    ("de", "Es kostet 1.250,50 Euro. ¦Das ist viel."),
    ("fr", "Il coûte 3,50 euros. ¦C'est peu."),
    ("en", "See Fig. 3 and Nos. 4 to 7. ¦They help."),
    ("en", "The call is at 10:30 a.m. ¦Do not be late."),
    # abbreviations and initials
    ("en", "Dr. Smith and Mrs. Jones came. ¦They stayed."),
    ("en", "Use a list, e.g. Python lists, i.e. arrays. ¦They are fast."),
    ("en", "He lives in the U.S. ¦He likes it."),
    ("en", "J. R. R. Tolkien wrote it. ¦I read it."),
    ("en", "We met at St. Mary's Church, near Mt. Everest. ¦It was cold."),
    ("en", "Apples, pears, etc. are fruit. ¦Eat them."),
    ("en", "Ask Prof. Lee, Gen. Park or Sgt. Kim. ¦They know."),
    ("en", "Brown et al. showed this. ¦It is true."),
    ("de", "Am 3. Oktober war es so weit. ¦Alle kamen."),
    ("de", "Nehmen Sie z. B. Holz oder d. h. Stein. ¦Beides hält."),
    ("de", "Das gilt z.B. für Hunde. ¦Katzen sind anders."),
    ("de", "Der 2. Weltkrieg endete. ¦Danach kam Frieden."),
    ("de", "König Ludwig XIV. Danach kam sein Urenkel."),
    ("de", "Frau Dr. Müller wohnt Nr. 5, ca. Hundert Meter weiter. ¦Gehen Sie hin."),
    ("de", "Der Preis inkl. Mehrwertsteuer, vgl. Abb. Drei bzw. Kap. Vier. ¦Das war alles."),
    ("de", "Hrn. Maier, Fa. Bosch und insb. Herr Klein, geb. Groß. ¦Alle da."),
    ("fr", "M. Dupont et Mme. Curie arrivent. ¦Ils parlent."),
    ("es", "El Sr. García vive en EE. UU. desde ayer. ¦Está bien."),
    ("es", "¿Qué tal? ¦¡Muy bien! ¦Me alegro."),
    ("it", "Il Sig. Rossi è qui. ¦Dott. Bianchi no."),
    ("pt", "Veja a pág. Cinco do livro. ¦O Sr. Silva leu."),
    ("es", "El núm. Cinco de la Cía. Grande, el Excmo. Señor. ¦Fin."),
    ("pt", "Na Av. Paulista mora o Eng. Silva, a Profª. Costa e a Srta. Melo. ¦Fim."),
    ("pl", "Pan inż. Nowak i mgr Kot z ul. Długiej, szkoła im. Kopernika. ¦Koniec."),
    ("ru", "Школа им. Пушкина, пл. Ленина, рис. Первый, св. Николай. ¦Конец."),
    ("el", "Ο καθ. Παπάς, λεωφ. Αθηνών, Αγ. Νικόλαος. ¦Τέλος."),
    ("tr", "Doç. Kaya, Av. Demir ve Sn. Yılmaz geldi. ¦Oturdu."),
    ("id", "Di Jl. Sudirman, Kec. Menteng, ada Ir. Soekarno. ¦Selesai."),
    ("vi", "Ở TP. Hà Nội có TS. Nam và ThS. Lan. ¦Hết."),
    ("th", "ดร. สมชาย และ ผศ. มานี มา. ¦จบ."),
    ("bn", "ডা. রহমান এলেন। ¦তিনি বসলেন।"),
    ("nl", "Dhr. Jansen en mevr. De Vries kwamen. ¦Zij bleven."),
    ("pl", "To jest dr. Kowalski, np. Jan. ¦Mieszka tu."),
    ("cs", "Dne 3. Října přišel. ¦Potom odešel."),
    ("ru", "А. С. Пушкин жил в г. Москва, т. е. в столице. ¦Там он писал."),
    ("ru", "Хлеб, соль и т. д. лежат тут. ¦Берите."),
    ("hi", "डॉ. शर्मा आए। ¦वे बैठे।"),
    ("he", 'ד"ר כהן הגיע. ¦הוא ישב.'),
    # the next word begins in lower case
    ("en", "Stop! he cried. ¦Nobody stopped."),
    ("en", "Yahoo! is a company. ¦It is old."),
    ("ru", "Стой! крикнул он. ¦Все встали."),
    # addresses
    ("en", "Write to jane.doe@example.com today. ¦She answers."),
    ("en", "Use node.js or example.com instead. ¦Both work."),
    ("en", "Open config.yaml first. ¦Then .env is next."),
    # ellipses and rows of marks
    ("en", "Well... I do not know. ¦Maybe."),
    ("en", "Wait… what? ¦Yes!"),
    ("en", "Hmm . . . let me think. ¦Done."),
    ("en", "Really?! ¦Yes!!! ¦Oh."),
    ("zh", "好的……我想想。¦可以。"),
    # quotations and brackets
    ("en", 'He said: "Go home. Now. Please." ¦She went.'),
    ("en", "He said “Go home. Now.” and left. ¦She stayed."),
    ("en", "It works (mostly. Not always.) and is cheap. ¦Buy it."),
    ("en", "It works. ¦(Mostly. Not always.) Buy it."),
    ("en", "She asked 'Who is it? Tell me.' and waited. ¦Nobody came."),
    ("en", "Don't stop. ¦It's the boys' turn. ¦They're here."),
    ("en", "Back in the '90s it was new. ¦Now it is old."),
    ("en", "A [note. Two notes.] here. ¦And {a set. B.} there."),
    ("de", "Er rief: „Halt! Wer da?“ ¦Niemand kam."),
    ("de", "Er rief: »Halt! Wer da?« und ging. ¦»Ich«, sagte sie."),
    ("fr", "Il dit : « Viens. Vite ! » ¦Elle vient."),
    ("fr", "Bonjour ! ¦Ça va ? ¦Oui."),
    ("es", "Dijo «ven. Ya.» y salió. ¦Nadie vino."),
    ("ru", "Он сказал: «Иди. Быстро!» ¦Она ушла."),
    ("zh", "他说：“你好。我走了。”¦然后离开。"),
    ("ja", "「行くよ。すぐに。」と言った。¦彼は出た。"),
    ("ja", "彼は『はい。』と答えた。¦終わり。"),
    # other scripts
    ("zh", "你好！¦今天天气很好。¦我们走吧？¦好。"),
    ("zh", "价格是3.14元。¦不贵。"),
    ("zh", "你好!¦我是小王。¦再见!"),
    ("ja", "今日は晴れ。¦明日は雨！¦本当？¦はい。"),
    ("ko", "안녕하세요. ¦반갑습니다! ¦3.14는 원주율입니다."),
    ("ar", "مرحبا بك. ¦كيف حالك؟ ¦أنا بخير."),
    ("ar", "د. أحمد هنا. ¦مرحبا."),
    ("fa", "سلام. ¦می‌خواهم بروم؟ ¦بله."),
    ("ur", "یہ ایک جملہ ہے۔ ¦یہ دوسرا ہے۔"),
    ("he", 'הוא אמר: "ד"ר כהן הגיע. הוא ישב." ¦סוף.'),
    ("he", "שלום לך. ¦מה שלומך? ¦בסדר."),
    ("hi", "यह एक वाक्य है। ¦यह दूसरा है।"),
    ("el", "Ο κ. Παπάς ήρθε. ¦Κάθισε."),
    ("hy", "Բարև։ ¦Ինչպես ես։"),
    # lines
    ("en", "Title\n\n¦A first line\n\n¦A second one"),
    ("en", "# Title\n\n¦1. Open it. ¦Look.\n\n¦2. Close it."),
    ("en", "One line\nand the same paragraph. ¦End."),
    # what looks like a language tag with a region
    ("de-AT", "Am 3. Oktober kam er. ¦Und blieb."),
    # combining characters and emoji that are kept together
    ("en", "Cafe\u0301. ¦Nai\u0308ve."),
    ("en", "Done 👩\u200d💻. ¦Good."),
]

CLAUSES = [
    ("en", "First, ¦second; ¦third: ¦fourth."),
    ("en", "It is 1,000 or 3:15 or a;b here."),
    ("en", "I think so — ¦and you — ¦maybe."),
    ("en", "I think so—¦you may—¦not."),
    ("en", "From 10–20 or 1999—2001 in well-known books."),
    ("en", 'Stay (here, there, anywhere) and "wait, please", ¦then go.'),
    ("fr", "Il vient ; ¦elle part : ¦fin."),
    ("ar", "أولاً، ¦ثانياً؛ ¦ثالثاً."),
    ("zh", "第一，¦第二；¦第三：¦完、¦了。"),
    ("zh", "数字是1，000和10：30。"),
    ("th", "สวัสดี ¦วันนี้ ¦มี 3 ตัว ¦ครับ"),
    ("en", "Oh, :) yes."),
]

WORDS = [
    ("en", "One ¦two ¦three."),
    ("en", "Call ¦555 1234 567 now, ¦it ¦is ¦5 km ¦away."),
    ("fr", "Cela ¦fait ¦10\u00a0000 euros\u00a0!"),
    ("fr", "Vraiment ? ¦Oui !"),
    ("en", "Dr. Who ¦came."),
]


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


def shape(text: str, language: str, lengths: tuple[Lengths, ...], step: int, clean: Clean) -> list[str]:
    shaper = Shaper(Shaping(clean, Cutting(language=language, lengths=lengths)))
    pieces = [piece for at in range(0, len(text), step) for piece in shaper.push(text[at : at + step])]
    return texts(pieces + shaper.finish())


@pytest.mark.parametrize("step", [1, NEVER])
@pytest.mark.parametrize(
    ("lengths", "language", "marked"),
    [(AT_SENTENCES, *case) for case in SENTENCES]
    + [(AT_CLAUSES, *case) for case in CLAUSES]
    + [(AT_WORDS, *case) for case in WORDS],
)
def test_cuts(lengths: tuple[Lengths, ...], language: str, marked: str, step: int) -> None:
    cleaner = Cleaner(Clean(emoji=False))
    cleaner.feed(marked, final=True)
    wanted = cleaner.text.split("¦")
    assert shape(marked.replace("¦", ""), language, lengths, step, Clean(emoji=False)) == wanted


CLEANED = [
    # emphasis
    ("This is *very* **good** and ***fine***.", "This is very good and fine."),
    ("_One_ and __two__, ~~not~~ three.", "One and two, not three."),
    ("2 * 3 = 6, 2*3, 2**3 and a*b", "2 * 3 = 6, 2*3, 2**3 and a*b"),
    ("snake_case and __init__ and _private", "snake_case and init and private"),
    ("这是**重要**的", "这是重要的"),
    ("**Bold.** Next", "Bold. Next"),
    ("about ~5 minutes", "about ~5 minutes"),
    (r"\*not emphasis\* and C:\Users", r"*not emphasis* and C:\Users"),
    ("Fill in the ____ here", "Fill in the here"),
    # headings and rules
    ("# Title\nText", "Title\nText"),
    ("### A **bold** title\nText", "A bold title\nText"),
    ("#hashtag and C# and # 5", "#hashtag and C# and # 5"),
    ("##Title\n###Next\nText", "Title\nNext\nText"),
    ("Title\n=====\nText", "Title\nText"),
    ("One\n\n---\n\nTwo\n* * *\nThree", "One\nTwo\nThree"),
    # lists, quotations, tables
    ("Fruit:\n- apples\n* pears\n+ plums\n• figs", "Fruit:\napples\npears\nplums\nfigs"),
    ("- [ ] open\n- [x] done", "open\ndone"),
    ("1. one\n2) two\n10. ten", "1. one\n2) two\n10. ten"),
    ("✅ Fast\n✅ **Cheap**\n🚀 Good", "Fast\nCheap\nGood"),
    ("1\ufe0f\u20e3 First\n2\ufe0f\u20e3 Second", "1 First\n2 Second"),
    ("So:\n– one\n— two\n⁃ three\n■ four\n➤ five", "So:\none\ntwo\nthree\nfour\nfive"),
    ("A – b\nand 1–2", "A – b and 1–2"),
    ("Either:\na) red\nB) blue\na or b", "Either:\na) red\nB) blue a or b"),
    ("- one\n  - nested\n    more", "one\nnested more"),
    ("> A word\n> of wisdom", "A word\nof wisdom"),
    ("-5 degrees - or so\n-10 at night", "-5 degrees - or so -10 at night"),
    ("| A | B |\n|---|:-:|\n| 1 | 2 |\n\nText", "A, B\n1, 2\nText"),
    ("a | b or a||b", "a | b or a||b"),
    # links
    ("See [the page](https://example.com/a_(b)) now.", "See the page now."),
    ('A [link](http://x.y "with a title") here', "A link here"),
    ("![A cat](cat.png) sleeps", "A cat sleeps"),
    ("Wow! [Look](x)", "Wow! Look"),
    ("True[1], so it is [2]. Also[^3].", "True, so it is. Also."),
    ("Known【4:0†source】.", "Known."),
    ("A [link](<http://x.y/a b> 'title') here", "A link here"),
    ("See this[^1] and[^long-note].\n\n[^1]: A note.\n[^long-note]: Another.", "See this and.\nA note.\nAnother."),
    ('Text [1].\n\n[1]: https://x.y/z "Title"\n[two]: <https://a.b>\nMore', "Text.\nMore"),
    ("[Note]: this stays, https://x.y goes", "[Note]: this stays, goes"),
    ("an [aside] and a[i](x y)", "an [aside] and a[i](x y)"),
    ("[unfinished](http://exa", "[unfinished]("),
    ("[**bold** link](u)", "bold link"),
    # code
    ("Use `a_b*c` and ``x`y``.", "Use a_b*c and x`y."),
    ("Before:\n```python\nprint('no. No!')\n```\nAfter", "Before:\nAfter"),
    ("Inline ```` ``` ```` ticks", "Inline ``` ticks"),
    ("A lone ` tick", "A lone tick"),
    ("Text ```js\nx = 1\n```", "Text"),
    ("````\n```\nstill code\n```\n````\nout", "out"),
    ("```\nnever closed", ""),
    ("Before:\n~~~python\nx = 1\n```\ny\n~~~\nAfter ~~~ it", "Before:\nAfter it"),
    ("~~~~\n~~~\n~~~~~ \nout", "out"),
    ("~5 minutes\n~~gone~~", "~5 minutes gone"),
    ("one\\\ntwo", "one two"),
    ("the `<div>` tag", "the <div> tag"),
    # addresses
    ("Visit https://example.com/a?b=c&d=1. Then go.", "Visit. Then go."),
    ("Visit www.example.com, please", "Visit, please"),
    ("(see https://example.com)", "(see)"),
    ("Here (https://example.com/x) it is", "Here it is"),
    ("<https://example.com> is it", "is it"),
    ("Read it here: https://example.com/x. Then go.", "Read it here. Then go."),
    ("See – https://example.com!", "See!"),
    ("Lire : https://example.com. Bien", "Lire. Bien"),
    ("It is here: https://example.com, or not", "It is here:, or not"),
    ("请看https://example.com/a。谢谢", "请看。谢谢"),
    ("Mail joe@example.com or www or http or h", "Mail joe@example.com or www or http or h"),
    ("whttp://x is no address", "whttp://x is no address"),
    # emoji
    ("Great 🎉!", "Great!"),
    ("Hi👋there", "Hi there"),
    ("A 👩\u200d💻 and 👍🏽 and 🇩🇪 and ❤\ufe0f.", "A and and and."),
    ("1\ufe0f\u20e3 First", "1 First"),
    ("Good (😀) and [🎉] “👍”.", "Good and."),
    ("© 2024 Acme™ → 5★", "© 2024 Acme™ → 5★"),
    ("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष"),
    # HTML
    ("<b>Bold</b> and <br/>a new<p>one</p>", "Bold and\na new\none"),
    ("H<sub>2</sub>O &amp; more&nbsp;&#33;", "H2O & more !"),
    ("a < b and x <3 y > z & co; &nosuch;", "a < b and x <3 y > z & co; &nosuch;"),
    ("if a<b and c>d or (a<b && c>d)", "if a<b and c>d or (a<b && c>d)"),
    (
        "List<T>, Vec<u8>, Map<String, V>, x<y>z, Option<Box<dyn T>>",
        "List<T>, Vec<u8>, Map<String, V>, x<y>z, Option<Box<dyn T>>",
    ),
    ("un<i>believ</i>able, x<sup>2</sup>, a<BR>b", "unbelievable, x2, a\nb"),
    ("<answer>Yes</answer> <your name>", "Yes <your name>"),
    ('<img src="a.png" alt="b" /> <details open>x</details>', "x"),
    ("<table><tr><td>1</td><td>2</td></tr></table>", "1\n2"),
    ("<details><summary>More</summary>Text</details>", "More\nText"),
    ("A &#x1F600; b&shy;c &zwnj;&#8203;d &lt;3", "A bc \u200cd <3"),
    ("One<!-- not\nthis --> two", "One two"),
    ("<think>Let me see.\n\nHm.</think>Yes.", "Yes."),
    ('<a href="https://example.com">Here</a>', "Here"),
    # white space and stray characters
    ("  a  b\t c\u2003d \r\n e  ", "a b c d e "),
    ("a\n\n\n\nb", "a\nb"),
    ("zero\u200bwidth\ufeff and\x00 \x07bell", "zerowidth and bell"),
    ("\u200fשלום\u200e a\u2028b", "שלום a b"),
    ("torn \ud83d\ude00 halves \ud835\udc9c and \ud83d one", "torn halves 𝒜 and one"),
    ("no\u00a0break", "no\u00a0break"),
]


@pytest.mark.parametrize("step", [1, 2, NEVER])
@pytest.mark.parametrize(("raw", "clean"), CLEANED)
def test_cleaning(raw: str, clean: str, step: int) -> None:
    cleaner = Cleaner(Clean())
    for at in range(0, len(raw), step):
        cleaner.feed(raw[at : at + step])
    cleaner.feed("", final=True)
    assert cleaner.text == clean


OFF = [
    ("emphasis", "*a* __b__ \\*"),
    ("headings", "# a\n---"),
    ("lists", "- a\n> b\n| c |"),
    ("links", "[a](b) and c[1]"),
    ("code", "`a` and ```b```"),
    ("urls", "see https://example.com now"),
    ("emoji", "a 🎉 b"),
    ("html", "<b>a</b> &amp;"),
    ("controls", "a\u200bb\x07"),
]


@pytest.mark.parametrize(("part", "raw"), OFF)
def test_each_part_can_be_switched_off(part: str, raw: str) -> None:
    on, off = Cleaner(Clean()), Cleaner(Clean(**{part: False}))
    on.feed(raw, final=True)
    off.feed(raw, final=True)
    assert "".join(off.text.split()) == "".join(raw.split())
    assert on.text != off.text


def test_there_are_enough_cases() -> None:
    assert len(SENTENCES) + len(CLAUSES) + len(WORDS) >= 80
