"""Files of records, with random access.

Which reader opens a path?            `open.py`
JSON Lines and JSON arrays            `json_files.py`
WebDataset tar archives               `tars.py`
Where does each record begin?         `index.py`: found once and saved
"""
