"""Short texts written for the tests of deduplication, in several scripts, and words of a made-up language."""

from __future__ import annotations

import random

FERRY = (
    "The ferry had two captains and they did not speak. One took her out in the morning, when the lake lay flat and "
    "grey, and the other brought her home after dark with the lamps lit along the rail. Between them they kept a "
    "slate in the wheelhouse, and whatever had to be said was said in chalk: the port engine runs hot, mind the new "
    "buoy off the mill, somebody has been at the sugar. The deckhand wiped it clean every Sunday. He was the only "
    "one aboard who knew that both men, each certain he was alone in it, corrected the other's spelling."
)
ORCHARD = (
    "My aunt pruned the pear trees in February with a saw her father had bent on purpose. You were not to watch her "
    "while she did it. She talked to the branches the whole time, low and reasonable, as if explaining to a child why "
    "the party was over, and when a limb came down she said thank you and stacked it with the rest. By April nobody "
    "could tell which cuts were hers and which were the winter's. The pears came small and hard that year and she "
    "was proud of every one, and gave them away in paper bags with the stems all pointing north."
)
CLOCK = (
    "Nobody in the office would admit to winding the clock, yet it never stopped. Accounts believed it was the night "
    "porter. The porter believed in a society of retired clerks with keys. When the building was sold the new owners "
    "had it opened, and behind the dial they found a card on which thirty-one people had signed their initials, each "
    "beside a date, each apparently believing that the others had died. The last entry was from that very Tuesday."
)
CHINESE = (
    "老船长每天清晨都要到码头上走一圈，看看潮水退到哪块石头。他说石头比日历可靠，因为石头从来不会骗人。"
    "镇上的孩子跟在他后面，数他在木板上留下的脚印，数到一百就跑回家吃早饭。"
)
THAI = "คุณยายเก็บกระป๋องเก่าไว้ใต้บันไดทุกใบ เพราะเชื่อว่าวันหนึ่งฝนจะตกลงมาในบ้าน และคนทั้งซอยจะต้องมาขอยืมกระป๋องของแก"
ARABIC = (
    "كان الحارس القديم يعدّ السفن التي تدخل الميناء كل مساء ويكتب أسماءها في دفتر صغير لا يقرؤه أحد غيره "
    "وحين سألوه لماذا يفعل ذلك قال إن البحر ينسى وأنا لا أنسى"
)
HINDI = (
    "नदी के किनारे वाली दुकान में बूढ़ा दर्जी हर शाम पुराने कपड़ों के टुकड़े जोड़कर पतंग बनाता था और बच्चों से कहता था "
    "कि हवा को भी कपड़े की ज़रूरत होती है वरना वह ठंड से काँपने लगती है"
)

SYLLABLES = [a + b for a in ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve") for b in "lmnrst"]


def generated(seed: int, count: int) -> list[str]:
    """Words of a made-up language with a skewed vocabulary of a few thousand, so that chance overlap occurs."""
    rng = random.Random(seed)
    return [
        rng.choice(("the", "and", "of", "a")) if rng.random() < 0.25 else "".join(rng.choices(SYLLABLES, k=2))
        for _ in range(count)
    ]
